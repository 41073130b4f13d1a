"""The trainer over several processes, started by torchrun: the run of one, whoever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from test_train import TINY, run

from moco_fast import cli
from moco_fast.train import checkpoint

SECONDS = 240  # after which a run has hung
# Statistics of four devices, however many processes there are.
RECIPE = replace(TINY, bn_splits=4, verify_every=2)


def options(config=RECIPE):
    """The recipe for the command line, where it differs from the preset of the digits."""
    values = {
        "preset": "digits", "epochs": config.epochs, "batch-size": config.batch_size, "width": config.width,
        "dim": config.dim, "queue-size": config.queue_size, "bn-splits": config.bn_splits,
        "log-every": 1, "checkpoint-every": config.checkpoint_every, "knn-every": config.knn_every,
        "knn-bank": config.knn_bank, "knn-queries": config.knn_queries, "threads": 1, "warmup-epochs": 0.0,
        "verify-every": config.verify_every, "lr-batch-size": config.lr_batch_size,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def torchrun(world, folder, *more, restarts=0, program=("-m", "moco_fast.cli", "pretrain"), flag="--out"):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
        f"--max-restarts={restarts}", *program, *more, flag, str(folder),
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "GOMP_SPINCOUNT": "2000", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def finish(process, status=0):
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert status is None or process.returncode == status, output
    return output


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By number of processes."""
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp("undisturbed") / "run"
        output = finish(torchrun(world, folders[world], *options()))
        assert output.count("Run folder:") == 1  # rank 0 alone speaks
    return folders


def assert_equal_losses(got, want, rtol):
    assert got.keys() == want.keys()
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=rtol), step


def test_two_processes_train_as_one(undisturbed):
    one, two = (losses(undisturbed[world]) for world in (1, 2))
    assert_equal_losses(two, one, 1e-5)
    states = [checkpoint.read(undisturbed[world]) for world in (1, 2)]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    assert states[0]["moco_fast"]["accuracy"] == pytest.approx(states[1]["moco_fast"]["accuracy"], abs=0.02)


def stopped(folder, world, step):
    """A run that SIGTERM ended, on all processes, once it had made some steps."""
    process = torchrun(world, folder, *options())
    while not ((folder / "metrics.jsonl").exists() and len(losses(folder)) >= step):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    return finish(process, status=None)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4)])
def test_resume_on_as_many_processes_or_others(undisturbed, tmp_path, before, after):
    stopped(tmp_path / "run", before, 3)
    saved = checkpoint.read(tmp_path / "run")["moco_fast"]["step"]
    assert 3 <= saved < 10
    finish(torchrun(after, tmp_path / "run", flag="--resume"))
    same = before == after == 2
    assert_equal_losses(losses(tmp_path / "run"), losses(undisturbed[2]), 0 if same else 1e-5)
    if same:
        a, b = (checkpoint.read(folder)["state_dict"] for folder in (tmp_path / "run", undisturbed[2]))
        assert all(torch.equal(value, b[name]) for name, value in a.items())


# Kills rank 1 of the first attempt in the middle of step 5.
KILLER = """
import os, signal, sys
from moco_fast import cli
from moco_fast.train.display import Display
advance = Display.advance
def advance_and_die(self, step):
    advance(self, step)
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
Display.advance = advance_and_die
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def test_a_killed_rank_is_named_and_the_run_goes_on(undisturbed, tmp_path):
    program = tmp_path / "killer.py"
    program.write_text(KILLER)
    began = time.monotonic()
    output = finish(torchrun(2, tmp_path / "run", *options(), restarts=1, program=(str(program),)))
    assert "rank 1 died or stopped answering; this was rank 0 of 2" in output, output
    assert time.monotonic() - began < SECONDS
    assert_equal_losses(losses(tmp_path / "run"), losses(undisturbed[2]), 0)
    a, b = (checkpoint.read(folder)["state_dict"] for folder in (tmp_path / "run", undisturbed[2]))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 252, "bn_splits": 1}, "batch_size=252 must be a multiple of 8"),
        ({"bn_splits": 2}, "bn_splits=2 must be 1 or a multiple of the 8 processes"),
        ({"sync_bn": True, "bn_splits": 1}, "sync_bn needs GPUs"),
    ],
)
def test_what_cannot_be_shared_out(tmp_path, monkeypatch, changes, message):
    from moco_fast import distributed
    from moco_fast.train import build

    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(ValueError, match=message):
        build.check_processes(replace(RECIPE, **changes), torch.device("cpu"))


def test_restarts_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.main(["pretrain", "--preset", "digits"]) == 1
    assert "out must be given where torchrun may restart a run" in capsys.readouterr().err


def test_accumulation_averages_the_parts(tmp_path):
    """Without batch statistics two parts are one batch; with them each part has its own, as two devices."""
    whole = run(tmp_path / "whole", replace(RECIPE, bn_splits=2))
    parts = run(tmp_path / "parts", replace(RECIPE, bn_splits=1, accumulation=2))
    assert whole.step == parts.step
    first = [losses(tmp_path / name)[1] for name in ("whole", "parts")]
    assert first[0] == pytest.approx(first[1], rel=0.05)  # the shuffle is missing, nothing else
