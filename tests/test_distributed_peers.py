"""Rows taken from the memory of peers, which here is that of one process, and the choice of that scheme."""

import sys
import types
import weakref

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


class Group:
    """Of processes: memory is that of one."""


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
            return [buffer.data_ptr() for buffer in buffers[:WORLD]] + [1] * (WORLD - len(buffers))

        def barrier(self, channel):
            barriers.append(channel)

    module = types.SimpleNamespace(empty=empty, rendezvous=lambda tensor, group: Handle())
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", module)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", module, raising=False)
    monkeypatch.setattr(torch.distributed, "group", types.SimpleNamespace(WORLD=Group()))
    # Also on the CPU beside a GPU, where Triton does not interpret.
    serves = types.SimpleNamespace(cannot_serve=lambda *_: None, on_device_of=backend.on_device_of)
    monkeypatch.setattr(peers, "backend", serves)
    return types.SimpleNamespace(buffers=buffers, barriers=barriers)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 8, 8)], ids=str)
def test_rows_of_all_peers(shared, device, shape, dtype):
    images = (torch.rand(WORLD * ROWS, *shape, device=device) * 255).to(dtype)
    if shape[1] == 8:
        images = images.contiguous(memory_format=torch.channels_last)
    batches = images.split(ROWS)
    for batch in batches:
        peers._shared_by_all(batch)
    places = torch.tensor([11, 0, 5, 6], device=device)
    for buffer, batch in zip(shared.buffers, batches, strict=True):
        buffer.copy_(moco_fast.reference.flat_rows(batch).view(torch.uint8).flatten())
    # The first rank reads its own batch, written by the call, and those of the others.
    memory = peers._shared_by_all(batches[0])
    memory._own = shared.buffers[0].fill_(0)
    got = memory.take(batches[0], places)
    assert torch.equal(got, images[places]) and shared.barriers == [0, 1]
    assert got.is_contiguous(memory_format=torch.channels_last) == (shape[1] == 8)


def test_places_of_any_stride(device):
    from moco_fast.kernels.take_rows import take_rows_of_peers

    images, out = torch.rand(6, 5, device=device), torch.empty(3, 5, device=device)
    addresses = torch.tensor([part.data_ptr() for part in images.split(3)], device=device)
    places = torch.tensor([5, 1, 0, 2, 3, 4], device=device)[::2]
    take_rows_of_peers(addresses, places, 3, out)
    assert torch.equal(out, images[places])


def test_a_batch_is_written_between_the_barriers(shared, device):
    """When all have read the one before, and before any reads this."""
    images, seen = torch.rand(ROWS, 3, device=device), []
    memory = peers._shared_by_all(images)
    memory._handle.barrier = lambda channel: seen.append((channel, bool((memory._own == 77).all())))
    memory.take(images, torch.arange(ROWS, device=device))
    assert seen == [(0, True), (1, False)]


def tried():
    """What comes of a batch in a group without memory for one yet."""
    torch.distributed.group.WORLD = Group()
    return peers.memory_if_faster(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), lambda: None)


def test_the_faster_way_is_taken(shared, monkeypatch):
    images, places = torch.zeros(ROWS, 2), torch.zeros(ROWS, dtype=torch.int64)
    for ours, others, taken in ((1e-3, 2e-3, True), (3e-3, 2e-3, False)):
        torch.distributed.group.WORLD = Group()
        found = iter([ours, others])
        monkeypatch.setattr(peers, "_seconds", lambda run, device, found=found: next(found))
        memory = peers.memory_if_faster(images, places, lambda: None)
        assert (memory is not None) == taken
        assert peers.memory_if_faster(images, places, lambda: None) is memory  # measured once


def test_memory_ends_with_its_group(shared, monkeypatch):
    monkeypatch.setattr(peers, "_measured", lambda *_: Group())
    memory = weakref.ref(tried())
    assert memory()
    torch.distributed.group.WORLD = None
    assert memory() is None


def test_every_dtype_is_measured(shared, monkeypatch):
    measured = []
    monkeypatch.setattr(peers, "_measured", lambda images, *_: measured.append(images.dtype))
    for dtype in (torch.uint8, torch.float32, torch.uint8):
        peers.memory_if_faster(torch.zeros(ROWS, 2, dtype=dtype), torch.arange(ROWS), lambda: None)
    assert measured == [torch.uint8, torch.float32]


def refuse(*args, **options):
    raise RuntimeError("no peer access")


def test_where_it_does_not_work_nothing_is_measured(shared, monkeypatch):
    monkeypatch.setattr(peers, "_seconds", refuse)
    symmetric = torch.distributed._symmetric_memory
    with monkeypatch.context() as patch:
        patch.setattr(symmetric, "rendezvous", refuse)
        assert tried() is None
    with monkeypatch.context() as patch:  # on another rank
        patch.setattr(peers, "largest", lambda failed: [1])
        assert tried() is None
    for handle in (
        types.SimpleNamespace(buffer_ptrs=[1, 0, 3]),  # memory of a GPU that this one does not reach
        types.SimpleNamespace(buffer_ptrs=[1, 2, 3], offset=64),  # within segments that begin there
    ):
        with monkeypatch.context() as patch:
            patch.setattr(symmetric, "rendezvous", lambda *_, handle=handle: handle)
            assert tried() is None


def test_without_triton_there_is_no_kernel_to_read_with(shared, monkeypatch):
    monkeypatch.setattr(peers, "backend", backend)
    monkeypatch.setattr(backend, "installed", lambda: False)
    monkeypatch.setattr(peers, "_seconds", refuse)
    assert tried() is None and not shared.buffers


@pytest.mark.parametrize(
    "other", [(("another", "boot"), True), (peers._machine(), False)], ids=["machine", "without memory"]
)
def test_nobody_waits_for_ranks_that_cannot_come(shared, monkeypatch, other):
    monkeypatch.setattr(peers, "from_all", lambda own: [own, other])
    monkeypatch.setattr(torch.distributed._symmetric_memory, "rendezvous", lambda *_: pytest.fail("waited"))
    assert tried() is None


def test_images_of_any_layout_and_another_process_group(shared, monkeypatch):
    found = iter([1e-3, 2e-3] * 2)
    monkeypatch.setattr(peers, "_seconds", lambda run, device: next(found))
    images = torch.rand(ROWS, 3, 4, 6).permute(0, 1, 3, 2)
    places = torch.arange(ROWS)
    memory = peers.memory_if_faster(images, places, lambda: None)
    monkeypatch.setattr("moco_fast.kernels.take_rows.take_rows_of_peers", lambda *args: None)
    memory.take(images, places)
    written = shared.buffers[0].view(torch.float32).view(images.shape)
    assert torch.equal(written, images)
    torch.distributed.group.WORLD = Group()
    assert peers.memory_if_faster(images, places, lambda: None) is not memory
