"""What processes on GPUs have to do otherwise, with gloo in NCCL's place; and whose GPU is whose."""

import os
import signal
import subprocess
import sys

import pytest
import ranks
import torch
import torch.distributed as dist

import moco_fast
from moco_fast import distributed
from moco_fast.train import build, processes
from moco_fast.train.meter import NonFiniteLossError
from moco_fast.train.run import Run

# Two processes on two GPUs, of which rank 1 fails. NCCL's group, be it destroyed or left to the end of
# Python, waits for the other ranks: forever, as they wait for rank 1.
PROGRAM = """
import atexit, signal, time
import torch, torch.distributed as dist
from moco_fast import distributed
from moco_fast.train import processes

atexit.register(time.sleep, 3600)
gloo = dist.init_process_group
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
torch.cuda.set_device = lambda device: None
dist.destroy_process_group = lambda: time.sleep(3600)

def nccl(backend, timeout, **options):
    assert (backend, timeout) == ("nccl", None)
    gloo("gloo", **options)

dist.init_process_group = nccl
signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's, for rank 1, before this rank has heard of it
with processes.joined("auto"):
    if distributed.rank() == 1:
        raise MemoryError("no memory for another batch")
    distributed.largest(0)
"""


def test_a_failure_ends_all_without_waiting_for_each_other(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = subprocess.Popen(
        [*command, str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    try:
        said, _ = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    assert started.returncode == 1
    assert "MemoryError: no memory for another batch" in said, said
    assert "rank 1 failed (MemoryError: no memory for another batch); this was rank 0 of 2" in said, said


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_process_has_to_know_its_gpu(monkeypatch):
    """Else all of a machine would take its first one."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "nowhere"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="LOCAL_RANK must be set"), processes.joined("cuda"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    missing = "no GPU for local rank 2: this machine has 2"
    with pytest.raises(ValueError, match=missing), processes.joined("cuda"):
        pass


@pytest.mark.parametrize(("variable", "device"), [("3", "cuda:3"), (None, "cuda:1")])
def test_the_device_of_a_group_that_was_there(monkeypatch, variable, device):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if variable:
        monkeypatch.setenv("LOCAL_RANK", variable)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda size, device: device)
    assert build.choose_device("cuda") == torch.device(device)


def rank_assigned_queue(rank):
    """The storage of a queue that was loaded with assign=True holds its transpose."""
    sent, broadcast = [], dist.broadcast
    dist.broadcast = lambda tensor, src: (sent.append(tensor.is_contiguous()), broadcast(tensor, src))
    ring = moco_fast.KeyQueue(4, 6)
    ring.load_state_dict({"queue": torch.rand(4, 6) + rank, "queue_ptr": torch.ones(1).long()}, assign=True)
    assert not ring.rows.is_contiguous()
    distributed.broadcast_(ring.rows, ring.queue_ptr)
    assert sent == [True, True]
    return ring.queue


def test_what_is_broadcast_is_contiguous(tmp_path):
    first, second = ranks.run(2, rank_assigned_queue, folder=tmp_path)
    assert torch.equal(first, second) and first.max() < 1


def rank_default_device(rank):
    with torch.device("meta"):  # as a script that has everything made on its GPU
        found = distributed.largest(rank, 5)
        shuffle = distributed.BatchShuffle()
        shuffle.agree(torch.device("cpu"))
        return found, shuffle.plan(4, 2, torch.device("cpu")).order


def test_a_default_device_is_that_of_neither_words_nor_permutations(tmp_path):
    (found, order), (_, other) = ranks.run(2, rank_default_device, folder=tmp_path)
    assert found == [1, 5]
    assert torch.equal(order, other) and sorted(order.tolist()) == list(range(8))


def rank_not_finite(rank, what, folder):
    """What is said on saving a model one of whose ranks holds NaN."""
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("own", torch.zeros(1))  # that no rank hears of
    if rank == 1:
        getattr(model, what)[0] = torch.nan
    optimizer = torch.optim.SGD(model.parameters())
    try:
        Run(folder, None, None, {}).save(
            model, optimizer, torch.Generator(), arch="", step=7, steps_per_epoch=1, facts={}
        )
    except (NonFiniteLossError, distributed.Disagreement) as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("running_mean", NonFiniteLossError, "not finite at step 7"),
        ("own", distributed.Disagreement, "rank 1: not finite at step 7"),
    ],
)
def test_weights_that_are_not_finite_on_one_rank_end_all(tmp_path, what, error, message):
    for kind, text in ranks.run(2, rank_not_finite, what, tmp_path, folder=tmp_path):
        assert kind is error and text.startswith(message), text
