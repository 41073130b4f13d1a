"""The trainer on several machines, which are network namespaces: as one, and when a cable is cut."""

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import test_train_processes
from test_train_processes import (
    KILLER,
    SECONDS,
    assert_equal_losses,
    assert_equal_states,
    finish,
    losses,
    options,
)

from bench import ranks
from bench.machines import INTERFACE, machines, unavailable
from moco_fast.train import checkpoint

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

# The trainer, with a heartbeat of 5 seconds instead of 40.
PROGRAM = """
import sys
from moco_fast import cli
from moco_fast.train import heartbeat
heartbeat.INTERVAL = 0.5
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def torchrun(made, program, *arguments, per_machine, restarts=0, interface=INTERFACE):
    """docs/distributed.md's command for several machines, on each."""
    started = []
    for i, machine in enumerate(made):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(made)),
            "--nproc-per-node", str(per_machine), "--max-restarts", str(restarts), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{made[0].address}:29500", "--rdzv-id", "run1",
            # What host names tell of machines that have one each.
            "--rdzv-conf", f"is_host={i == 0}", "--local-addr", machine.address, *program, *arguments,
        ]  # fmt: skip
        environment = {"GOMP_SPINCOUNT": "2000", "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": interface}
        started.append(machine.start(command, **environment))
    return started


def test_two_machines_train_as_one_with_as_many_processes(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(test_train_processes.torchrun(4, alone, *options()))
    with machines(2) as made:
        program = ("-m", "moco_fast.cli", "pretrain")
        started = torchrun(made, program, *options(), "--out", str(shared), per_machine=2)
        said = [finish(process) for process in started]
    assert [text.count("Run folder:") for text in said] == [1, 0]  # rank 0 alone speaks
    assert_equal_losses(losses(shared), losses(alone), 0)
    assert_equal_states(shared, alone)


@pytest.fixture
def made_by_debian():
    """Two machines whose own name leads to loopback, on each of them."""
    with machines(2) as made:
        folders = [Path("/etc/netns", machine.name) for machine in made]
        try:
            for folder in folders:
                folder.mkdir(parents=True)
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
            yield made
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


JOINED = """
import socket
from moco_fast import distributed
from moco_fast.train import processes
with processes.joined("cpu"):
    print(distributed.from_all(socket.gethostbyname(socket.gethostname())))
"""


def test_machines_whose_names_lead_to_themselves_meet(made_by_debian, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(JOINED)
    for process in torchrun(made_by_debian, (str(program),), per_machine=1, interface=""):
        assert "['127.0.1.1', '127.0.1.1']" in finish(process)


def test_a_machine_that_is_cut_off_is_named_on_the_others(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    config = ("--epochs", "1000", "--out", str(tmp_path / "run"))
    with machines(2) as made:
        started = torchrun(made, (str(program),), *options(), *config, per_machine=2)
        try:
            deadline = time.monotonic() + SECONDS
            while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 5:
                assert started[0].poll() is None, finish(started[0], status=None)
                assert time.monotonic() < deadline
                time.sleep(0.02)
            made[1].cut_off()
            cut = time.monotonic()
            said = finish(started[0], status=1)
            seconds = time.monotonic() - cut
            time.sleep(6)
        finally:
            for process in started:
                process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
        elsewhere = finish(started[1], status=None)
    for rank in range(2):
        assert f"ranks 2, 3 died or stopped answering; this was rank {rank} of 4" in said, said
    for rank in (2, 3):
        assert f"does not answer; this was rank {rank} of 4" in elsewhere, elsewhere
    assert seconds < 60
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] >= 3


def test_a_killed_rank_costs_one_restart(tmp_path):
    """Though only the torchrun of the killed rank counts one."""
    alone, shared, program = tmp_path / "alone", tmp_path / "shared", tmp_path / "killer.py"
    program.write_text(KILLER)
    finish(test_train_processes.torchrun(2, alone, *options()))
    with machines(2) as made:
        arguments = (*options(), "--out", str(shared))
        started = torchrun(made, (str(program),), *arguments, per_machine=1, restarts=1)
        said = [finish(process) for process in started]
    assert (tmp_path / "died").exists()
    assert "rank 1 died or stopped answering" in "".join(said)
    assert_equal_losses(losses(shared), losses(alone), 0)


def test_the_benchmark_of_ranks_behind_cables(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- cables:begin -->\n<!-- cables:end -->\n")
    ranks.main(["--quick", "--gbit", "1", "--out", str(tmp_path), "--doc", str(document)])
    assert "behind a cable of 1 Gb/s" in document.read_text() and "| by bytes alone |" in document.read_text()
    assert len(list(tmp_path.glob("*-cables.png"))) == 1
