"""Rows taken from the memory of peers, which here is that of one process, and the choice of that scheme."""

import sys
import types

import pytest
import torch
from conftest import interpreter_fault

import moco_fast
from moco_fast.distributed import peers
from moco_fast.kernels import backend

WORLD, ROWS = 3, 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if reason := backend.cannot_serve("take_rows", (torch.empty(1, device=request.param),)):
        pytest.skip(reason)
    if request.param == "cpu" and (reason := interpreter_fault()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def shared(monkeypatch):
    """The symmetric memory of ranks that are objects of this process."""
    buffers, barriers = [], []

    def empty(size, dtype, device):
        buffers.append(torch.full((size,), 77, dtype=dtype, device=device))
        return buffers[-1]

    class Handle:
        @property
        def buffer_ptrs(self):
            return [buffer.data_ptr() for buffer in buffers[:WORLD]] + [0] * (WORLD - len(buffers))

        def barrier(self, channel):
            barriers.append(channel)

    module = types.SimpleNamespace(empty=empty, rendezvous=lambda tensor, group: Handle())
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", module)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", module, raising=False)
    monkeypatch.setattr(peers, "_memory", {})
    return types.SimpleNamespace(buffers=buffers, barriers=barriers)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 8, 8)], ids=str)
def test_rows_of_all_peers(shared, device, shape, dtype):
    images = (torch.rand(WORLD * ROWS, *shape, device=device) * 255).to(dtype)
    if shape[1] == 8:
        images = images.contiguous(memory_format=torch.channels_last)
    batches = images.split(ROWS)
    for batch in batches:
        peers.PeerMemory(batch)
    places = torch.tensor([11, 0, 5, 6], device=device)
    for buffer, batch in zip(shared.buffers, batches, strict=True):
        buffer.copy_(moco_fast.reference.flat_rows(batch).view(torch.uint8).flatten())
    # The first rank reads its own batch, written by the call, and those of the others.
    memory = peers.PeerMemory(batches[0])
    memory._own = shared.buffers[0].fill_(0)
    got = memory.take(batches[0], places)
    assert torch.equal(got, images[places]) and shared.barriers == [0, 1]
    assert got.is_contiguous(memory_format=torch.channels_last) == (shape[1] == 8)


def test_the_faster_way_is_taken(shared, monkeypatch):
    images, places = torch.zeros(ROWS, 2), torch.zeros(ROWS, dtype=torch.int64)
    for ours, others, taken in ((1e-3, 2e-3, True), (3e-3, 2e-3, False)):
        monkeypatch.setattr(peers, "_memory", {})
        found = iter([ours, others])
        monkeypatch.setattr(peers, "_seconds", lambda run, device, found=found: next(found))
        memory = peers.memory_if_faster(images, places, lambda: None)
        assert (memory is not None) == taken
        assert peers.memory_if_faster(images, places, lambda: None) is memory  # measured once


def test_where_it_does_not_work_nothing_is_measured(shared, monkeypatch):
    def refuse(tensor, group):
        raise RuntimeError("no peer access")

    monkeypatch.setattr(torch.distributed._symmetric_memory, "rendezvous", refuse)
    monkeypatch.setattr(peers, "_seconds", None)
    assert peers.memory_if_faster(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), lambda: None) is None
    monkeypatch.setattr(peers, "_memory", {})
    monkeypatch.setattr(torch.distributed._symmetric_memory, "rendezvous", lambda tensor, group: refuse)
    monkeypatch.setattr(peers, "largest", lambda failed: [1])  # on another rank
    monkeypatch.setattr(peers.PeerMemory, "__init__", lambda self, images: None)
    assert peers.memory_if_faster(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), lambda: None) is None
