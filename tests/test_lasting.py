"""Commands whose output nobody takes any more, or whose names cannot be printed."""

import os
import subprocess
import sys

import pytest

from moco_fast.train import checkpoint

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

TINY = ["pretrain", "--data", "digits", "--epochs", "1", "--width", "8", "--dim", "16", "--knn-bank", "200"]
TINY += ["--threads", "1", "--checkpoint-every", "1000"]


def command(*arguments, **options):
    environment = {**os.environ, **options.pop("environment", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "moco_fast.cli", *map(str, arguments)], env=environment, **options
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("where", ["a pipe that was closed", "a disk that is full"])
def test_a_run_ends_though_nobody_reads(tmp_path, where):
    if where == "a disk that is full":
        with open("/dev/full", "w") as full:
            running = command(*TINY, "--out", tmp_path / "run", stdout=full)
    else:
        read, write = os.pipe()
        running = command(*TINY, "--out", tmp_path / "run", stdout=write)
        os.close(write)
        os.read(read, 1)
        os.close(read)
    assert running.wait(300) == 0
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["accuracy"]["trained"] > 0


def test_names_are_printed_as_they_are(tmp_path):
    """Brackets are no markup, and what an encoding lacks is escaped."""
    folder = tmp_path / "s[lr=0.1] é"
    running = command(
        *TINY, "--out", folder, stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": "ascii"}
    )
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 0
    assert "s[lr=0.1] \\xe9" in out.decode("ascii").replace("\n", "")
