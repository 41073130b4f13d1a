"""The sweep written for Hopper, where a single query decides how all of its block are computed."""

import math

import pytest
import torch
from test_info_nce import make
from test_info_nce_sweep import sweep
from torch.nn import functional as F


@pytest.mark.parametrize("what", ["far", "long"])
@pytest.mark.parametrize("row", [1, 9])  # a thread looks after two, 8 apart
def test_one_query_alone_takes_the_running_maximum(what, row):
    """As its exponentials under the fixed shift are too small, or infinite."""
    direction = F.normalize(torch.randn(128), dim=0)
    q = direction + 0.02 * torch.randn(20, 128)
    queue = F.normalize(direction + 0.02 * torch.randn(200, 128), dim=1)
    fixed = 1 / (math.log(2) * 0.07) - 15
    *_, shifts, _, _ = sweep(q, q.clone(), queue.half(), 0.07, 1, 2, least=2.0**-10)
    assert (shifts == fixed).all()
    if what == "far":
        q[row] *= -1
    else:
        q[row] = torch.randn(128)
        queue[5] = 1.3 * F.normalize(q[row], dim=0)
    least = 2.0**-10 if what == "far" else 0.0
    k = q.roll(1, dims=0)
    *_, shifts, cosines, ranks = sweep(q, k, queue.half(), 0.07, 1, 2, least=least)
    assert (shifts != fixed).any()
    *_, want_cosines, want_ranks = sweep(q, k, queue.half(), 0.07, 1, 2, online=True)
    assert torch.equal(cosines, want_cosines) and torch.equal(ranks, want_ranks)  # counted once
    assert (ranks > 0).any()


@pytest.mark.parametrize("n", [20, 70])
def test_ties_are_not_above(n):
    """One row of the queue is nearer than the key, one as near, in numbers that fp16 holds."""
    q, k = torch.zeros(2, n, 128).unbind()
    q[:, 0], k[:, :4] = 3, 1
    queue = torch.zeros(200, 128)
    queue[3, 0], queue[150, :4] = 1, 0.5
    _, _, pos, *_, ranks = sweep(q, k, queue.half(), 0.2, 1, 2)
    assert (pos == 0.5).all() and (ranks.sum(0) == 1).all()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("n", [33, 129])
def test_the_order_of_threads_does_not_matter(n, stats):
    q, k, queue = make(n, 1100, 128, queue_dtype=torch.float16)
    k = k.roll(1, dims=0)  # others' keys, which some rows of the queue are nearer than
    first = sweep(q, k, queue, 0.2, 2, 5, stats, seed=0)
    for seed in range(1, 6):
        again = sweep(q, k, queue, 0.2, 2, 5, stats, seed=seed)
        written = 8 if stats else 6
        assert all(torch.equal(*pair) for pair in zip(first[:written], again[:written], strict=True))
