"""The SLURM script, on stand-ins for SLURM's commands and torchrun that say what they were called with."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "slurm.sh"
COMMANDS = {
    # Written first: once it has a line, head goes, and what still speaks to it dies.
    "scontrol": 'echo "$@" > scontrol; echo node7; echo node8',
    "srun": 'echo "$SRUN_CPUS_PER_TASK" > srun; exec "$@"',
    "torchrun": 'printf "%s\\n" "$@"',
}


@pytest.fixture
def submit(tmp_path):
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN"))}
    environment = elsewhere | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_NAME": "moco-v2", "SLURM_JOB_ID": "31",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "96",
    }  # fmt: skip

    def run(*arguments, **more):
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    return run


def test_what_is_started_on_every_machine(submit, tmp_path):
    said = submit("--data", "my images/", "--batch-size", "1024", SLURM_GPUS_ON_NODE="8")
    assert (tmp_path / "scontrol").read_text() == "show hostnames node[7-8]\n"
    assert (tmp_path / "srun").read_text() == "96\n"
    options = dict(zip(said[0:12:2], said[1:12:2], strict=True))
    assert options == {
        "--nnodes": "2", "--nproc-per-node": "8", "--max-restarts": "3", "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node7:29500", "--rdzv-id": "31",
    }  # fmt: skip
    started = ["-m", "moco_fast.cli", "pretrain", "--out", "runs/moco-v2"]
    assert said[12:] == [*started, "--data", "my images/", "--batch-size", "1024"]


def test_submitted_again_it_goes_on(submit, tmp_path):
    (tmp_path / "runs" / "moco-v2").mkdir(parents=True)
    (tmp_path / "runs" / "moco-v2" / "checkpoint.pth").touch()
    said = submit("--preset", "moco-v2")
    assert said[2:4] == ["--nproc-per-node", "1"]  # without GPUs
    assert said[12:] == ["-m", "moco_fast.cli", "pretrain", "--resume", "runs/moco-v2"]


def test_machines_get_one_torchrun_each():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1" and asked["signal"] == "TERM@120"
