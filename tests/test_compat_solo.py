"""moco_fast.compat.solo against the formulas of solo-learn, written out."""

import copy

import pytest
import ranks
import torch
from largest import Largest
from torch.nn import functional as F

from moco_fast.compat.solo import mocov2plus_loss_func, mocov3_loss_func


def views(n, dim, dtype=torch.float64, keys_want=False):
    query = 3 * torch.randn(n, dim, dtype=dtype)
    key = query + torch.randn(n, dim, dtype=dtype)
    return query.requires_grad_(), key.requires_grad_(keys_want)


def gradients(loss, *inputs):
    return [loss, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], retain_graph=True)]


def v2plus(query, key, queue, temperature):
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def v3(query, key, temperature, rank=0):
    """``key`` of all ranks."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(query)) + rank * len(query))


@pytest.mark.parametrize("keys_want", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1])
@pytest.mark.parametrize("shape", [(1, 3, 5), (5, 33, 37), (16, 8, 64)], ids=str)
def test_v2plus(shape, temperature, keys_want):
    """On unit rows, with gradients to what was normalised; the queue of one of two views, as it is there."""
    n, dim, slots = shape
    raw = views(n, dim, keys_want=keys_want)
    unit = [F.normalize(x, dim=1) for x in raw]
    queue = F.normalize(torch.randn(2, dim, slots, dtype=torch.float64), dim=1)[1]
    got = gradients(mocov2plus_loss_func(*unit, queue, temperature), *raw)
    want = gradients(v2plus(*unit, queue, temperature), *raw)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_v2plus_may_lose_its_queue_before_backward():
    raw = views(5, 8)
    unit = [F.normalize(x, dim=1) for x in raw]
    queue = F.normalize(torch.randn(8, 20, dtype=torch.float64), dim=0)
    want = gradients(v2plus(*unit, queue.clone(), 0.1), raw[0])
    loss = mocov2plus_loss_func(*unit, queue)
    queue.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, raw[0])[0], want[1])


def test_v2plus_holds_no_logits():
    queue = F.normalize(torch.randn(4, 2048), dim=0)
    query, key = (F.normalize(x, dim=1) for x in views(512, 4, torch.float32))
    with Largest() as largest:
        mocov2plus_loss_func(query, key, queue).backward()
    assert largest.elements < 512 * 2048 / 4


@pytest.mark.parametrize("keys_want", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 1])
@pytest.mark.parametrize("shape", [(1, 3), (5, 33), (16, 8)], ids=str)
def test_v3(shape, temperature, keys_want):
    raw = views(*shape, keys_want=keys_want)
    got = gradients(mocov3_loss_func(*raw, temperature), *raw)
    want = gradients(v3(*raw, temperature), *raw)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def of_rank(rank):
    torch.manual_seed(rank)
    query, key = views(5, 8, keys_want=True)
    loss = mocov3_loss_func(query, key)
    loss.backward()
    return query, key, loss.detach(), query.grad, key.grad


def test_v3_over_ranks(tmp_path):
    """Keys of all ranks, constant; labels begin at the rank's own."""
    results = ranks.run(2, of_rank, folder=tmp_path)
    keys = torch.cat([result[1].detach() for result in results])
    for rank, (query, _, loss, query_gradient, key_gradient) in enumerate(results):
        query = query.detach().requires_grad_()
        want = gradients(v3(query, keys, 0.2, rank), query)
        torch.testing.assert_close([loss, query_gradient], want)
        assert key_gradient is None


@pytest.mark.parametrize("function", [mocov2plus_loss_func, mocov3_loss_func])
def test_descent_lowers_the_loss(function):
    """Steps on the views themselves, keys included."""
    query, key = (F.normalize(x.detach(), dim=1).requires_grad_() for x in views(32, 128, torch.float32))
    queue = [F.normalize(torch.randn(128, 500), dim=0)] if function is mocov2plus_loss_func else []
    losses = []
    for _ in range(20):
        loss = function(query, key, *queue, temperature=0.1)
        loss.backward()
        for x in (query, key):
            x.data.sub_(0.5 * x.grad)
            x.grad = None
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """Queries in 16 bits against keys and a queue in fp32, as under autocast."""
    query, key = (F.normalize(x.detach(), dim=1) for x in views(8, 16, torch.float32))
    queue = F.normalize(torch.randn(16, 32), dim=0)
    half = copy.deepcopy(query).to(dtype).requires_grad_()
    for loss, want in (
        (mocov2plus_loss_func(half, key, queue), v2plus(query, key, queue, 0.1)),
        (mocov3_loss_func(half, key), v3(query, key, 0.2)),
    ):
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), abs=0.05)
        assert half.grad.dtype == dtype


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"key": torch.ones(3, 4)}, ValueError, r"key must have the shape of query, \(2, 4\)"),
        ({"query": torch.ones(4)}, ValueError, "query must have 2 dimensions"),
        ({"query": [1]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"queue": torch.ones(9, 4)}, ValueError, r"queue must have shape \(4, K\) for query \(2, 4\), got"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changed, error, words):
    good = {"query": torch.ones(2, 4), "key": torch.ones(2, 4), "queue": torch.ones(4, 9), "temperature": 0.1}
    with pytest.raises(error, match=words):
        mocov2plus_loss_func(**(good | changed))
    if "queue" not in changed:
        del good["queue"]
        with pytest.raises(error, match=words):
            mocov3_loss_func(**(good | changed))
