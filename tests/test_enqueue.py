"""enqueue_: every backend against indexing, with wrap-around at any batch size."""

import copy

import pytest
import torch
from torch.nn import functional as F

import moco_fast
from moco_fast.ops.rows import _enqueue_
from moco_fast.queue import Ring

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

OP = "enqueue_"


@pytest.mark.parametrize("keys_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("slots", "batch", "width"), [(1, 1, 1), (7, 3, 5), (10, 10, 32), (1000, 257, 128)])
def test_rows_and_pointer(backend, slots, batch, width, queue_dtype, keys_dtype):
    queue = F.normalize(torch.randn(slots, width), dim=1).to(queue_dtype)
    ptr = torch.tensor([slots - 1])  # wraps at once unless the batch is 1
    want, position = queue.clone(), slots - 1
    for _ in range(4):
        keys = (torch.randn(batch, width) * 5).to(keys_dtype)
        for key in F.normalize(keys.float(), dim=1).to(queue_dtype):
            want[position] = key
            position = (position + 1) % slots
        moco_fast.enqueue_(queue, ptr, keys)
        assert ptr.item() == position
        torch.testing.assert_close(queue, want, rtol=torch.finfo(queue_dtype).eps, atol=1e-7)


def test_a_full_round_replaces_every_row(backend):
    """NaN-poisoned queue: no slot is left out, none is written twice."""
    queue, ptr = torch.full((100, 16), float("nan")), torch.tensor([40])
    for _ in range(5):
        moco_fast.enqueue_(queue, ptr, torch.randn(20, 16))
    assert ptr.item() == 40
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(100))


def test_column_storage_and_gaps(backend):
    """A queue that is a view with gaps is written through, and the gaps stay."""
    base = torch.zeros(10, 8)
    ptr = torch.zeros(1, dtype=torch.long)
    moco_fast.enqueue_(base[:, ::2], ptr, torch.ones(3, 4))
    assert base[:3, ::2].eq(0.5).all() and base[:, 1::2].eq(0).all() and base[3:].eq(0).all()


@pytest.mark.parametrize(("first", "position"), [(0, 1), (2, 3)])
def test_keys_may_be_rows_of_the_queue(backend, first, position):
    queue = F.normalize(torch.randn(6, 4), dim=1)
    want = queue.clone()
    want[position : position + 3] = queue[first : first + 3].clone()
    moco_fast.enqueue_(queue, torch.tensor([position]), queue[first : first + 3])
    torch.testing.assert_close(queue, want)


@pytest.mark.parametrize("position", [-1, 10, 25])
def test_pointer_outside_the_queue(backend, device, position):
    queue, ptr = torch.ones(10, 4), torch.tensor([position])
    if device == "cuda":  # not read back: taken modulo K
        moco_fast.enqueue_(queue, ptr, torch.zeros(2, 4))
        assert ptr.item() == (position + 2) % 10 and (queue == 0).all(1).sum() == 2
        return
    with pytest.raises(ValueError, match=rf"ptr must be in \[0, 10\), got {position}"):
        moco_fast.enqueue_(queue, ptr, torch.zeros(2, 4))
    assert (queue == 1).all() and ptr.item() == position


def test_key_queue_module(backend):
    queue = moco_fast.KeyQueue(8, 20)
    assert [(n, tuple(b.shape)) for n, b in queue.state_dict().items()] == [
        ("queue", (8, 20)),
        ("queue_ptr", (1,)),
    ]
    assert queue.rows.is_contiguous() and queue.rows.data_ptr() == queue.queue.data_ptr()
    queue.enqueue_(torch.randn(15, 8))
    queue.enqueue_(torch.randn(15, 8))
    assert queue.queue_ptr.item() == 10
    torch.testing.assert_close(queue.queue.norm(dim=0), torch.ones(20))


def test_mirror_holds_the_same_rows(backend):
    queue, ptr = torch.zeros(10, 12), torch.tensor([7])
    mirror = torch.zeros(10, 12, dtype=torch.float16)
    moco_fast.enqueue_(queue, ptr, torch.randn(5, 12), mirror)
    assert ptr.item() == 2 and torch.equal(mirror, queue.half()) and queue[3:7].eq(0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_keys_in_another_order(backend, stride):
    """What un-shuffles them on the way into the queue and its mirror."""
    queue, want = torch.zeros(10, 12), torch.zeros(10, 12)
    mirror = torch.zeros(10, 12, dtype=torch.float16)
    keys, order = torch.randn(5, 12), torch.tensor([3, 0, 4, 1, 2]).repeat_interleave(stride)[::stride]
    ptr, want_ptr = torch.tensor([7]), torch.tensor([7])
    moco_fast.enqueue_(queue, ptr, keys, mirror, order)
    moco_fast.enqueue_(want, want_ptr, keys[order])
    torch.testing.assert_close(queue, want)
    assert torch.equal(mirror, queue.half()) and torch.equal(ptr, want_ptr)
    moco_fast.enqueue_(queue, ptr, keys, order=order)
    moco_fast.enqueue_(want, want_ptr, keys[order])
    torch.testing.assert_close(queue, want)


def test_key_queue_keeps_its_mirror_in_step(backend):
    """What the loss reads is the buffer as it is now, whoever wrote it."""
    queue = moco_fast.KeyQueue(8, 600)
    bits = torch.float16 if backend == "triton" else torch.float32

    def in_step():
        return queue.negatives.dtype == bits and torch.equal(queue.negatives, queue.rows.to(bits))

    assert in_step()
    kept = queue.negatives
    queue.enqueue_(torch.randn(15, 8))
    assert in_step() and queue.negatives.data_ptr() == kept.data_ptr()  # written, not made anew
    queue.queue[:, :3] = 0.5
    assert in_step()
    queue.load_state_dict(moco_fast.KeyQueue(8, 600).state_dict())
    assert in_step()
    assigned = moco_fast.KeyQueue(8, 600).state_dict()
    while assigned["queue"]._version < queue.queue._version:  # as if the mirror were of these
        assigned["queue"].fill_(0.125)
    queue.load_state_dict(assigned, assign=True)
    assert in_step()
    version = queue.queue._version
    copied = copy.deepcopy(queue)
    while copied.queue._version < version:  # a count of versions that means nothing here
        copied.queue.fill_(0.25)
    queue = copied
    assert in_step()
    queue = queue.half()
    assert in_step() or bits == torch.float32
    assert list(queue.state_dict()) == ["queue", "queue_ptr"]


@pytest.fixture
def mirrored(monkeypatch):
    """A queue whose mirror is read, as on a GPU."""
    monkeypatch.setattr(Ring, "_mirror_is_read", staticmethod(lambda rows: True))
    return moco_fast.KeyQueue(8, 60)


def in_step(queue):
    return torch.equal(queue.negatives, queue.rows.half())


def test_a_mirror_made_in_an_evaluation_serves_the_training(mirrored):
    with torch.inference_mode():
        assert in_step(mirrored)
    mirrored.enqueue_(torch.randn(7, 8))
    assert in_step(mirrored)
    mirrored.load_state_dict(moco_fast.KeyQueue(8, 60).state_dict())
    with torch.inference_mode():
        assert in_step(mirrored)
    mirrored.enqueue_(torch.randn(7, 8))
    assert in_step(mirrored)


def test_a_mirror_shows_what_was_written_before_keys(mirrored):
    assert in_step(mirrored)
    mirrored.queue.fill_(0.25)
    mirrored.enqueue_(torch.randn(7, 8))
    assert in_step(mirrored)


def test_a_mirror_shows_buffers_that_took_the_place_of_others(mirrored):
    """Whose versions count from 0 again."""
    assert in_step(mirrored)
    mirrored._apply(lambda x: torch.full_like(x, 0.5) if x.is_floating_point() else x)
    assert in_step(mirrored)


def test_a_mirror_stays_where_cuda_graphs_know_it(mirrored):
    address = mirrored.negatives.data_ptr()
    mirrored.load_state_dict(moco_fast.KeyQueue(8, 60).state_dict())
    assert in_step(mirrored) and mirrored.negatives.data_ptr() == address
    assert in_step(mirrored.double()) and mirrored.negatives.data_ptr() == address
    assert mirrored.to("meta").negatives.device.type == "meta"


def test_replays_that_raise_no_version(mirrored, monkeypatch):
    """Of a CUDA graph that was captured before there was a mirror."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(moco_fast.queue.ops, "enqueue_", lambda *args: None)
    mirrored.enqueue_(torch.randn(7, 8))
    monkeypatch.undo()
    monkeypatch.setattr(Ring, "_mirror_is_read", staticmethod(lambda rows: True))
    assert in_step(mirrored)
    mirrored.queue.data.fill_(0.5)
    assert in_step(mirrored)


def test_a_compiled_step_with_a_mirror(mirrored):
    """In one graph; afterwards the mirror is written anew."""
    assert in_step(mirrored)
    step = torch.compile(mirrored.enqueue_, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        before = mirrored.queue.clone()
        step(torch.randn(7, 8))
        assert not torch.equal(mirrored.queue, before) and in_step(mirrored)


def test_opcheck_and_compile(backend):
    queue, ptr, keys = torch.zeros(10, 4), torch.tensor([8]), torch.randn(5, 4)
    torch.library.opcheck(_enqueue_, (queue, ptr, keys, None, None))
    torch.library.opcheck(_enqueue_, (queue, ptr, keys, queue.half(), torch.tensor([4, 3, 2, 1, 0])))
    want, want_ptr = queue.clone(), ptr.clone()
    moco_fast.enqueue_(want, want_ptr, keys)
    torch.compile(moco_fast.enqueue_, fullgraph=True)(queue, ptr, keys)
    assert torch.equal(queue, want) and torch.equal(ptr, want_ptr)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": torch.zeros(2, 5)}, ValueError, r"queue must have shape \(K, 5\).*got \(10, 4\)"),
        ({"keys": torch.zeros(11, 4)}, ValueError, "keys holds 11 rows, more than the queue's 10 slots"),
        ({"keys": torch.zeros(0, 4)}, ValueError, "keys must hold at least one row"),
        ({"keys": torch.zeros(2, 4, dtype=torch.int8)}, TypeError, "keys must have a floating-point dtype"),
        ({"ptr": torch.zeros(1)}, TypeError, "ptr must be an int64 tensor"),
        ({"ptr": 3}, TypeError, "ptr must be an int64 tensor.*got int"),
        ({"queue": torch.zeros(10, 4, requires_grad=True)}, ValueError, "queue requires grad"),
        ({"mirror": torch.zeros(9, 4)}, ValueError, r"mirror must have the shape of queue, \(10, 4\)"),
        ({"mirror": torch.zeros(10, 4, dtype=torch.int8)}, TypeError, "mirror must have a floating"),
        ({"mirror": torch.zeros(10, 4, requires_grad=True)}, ValueError, "mirror requires grad"),
        ({"order": torch.zeros(2)}, TypeError, "order must be an int64 tensor of one dimension"),
        ({"order": torch.tensor([0])}, ValueError, r"order must number the 2 keys, got shape \(1,\)"),
        ({"order": torch.tensor([0, 2])}, ValueError, r"order must be in \[0, 2\), got 0 to 2"),
        ({"keys": torch.zeros(2, 4, device="meta")}, ValueError, "keys is on meta, but queue is on cpu"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"queue": torch.ones(10, 4), "ptr": torch.tensor([3]), "keys": torch.ones(2, 4)} | changes
    before = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    with pytest.raises(error, match=message):
        moco_fast.enqueue_(**arguments)
    for name in ("queue", "ptr"):
        same = before[name] == arguments[name]
        assert same.all() if isinstance(same, torch.Tensor) else same
