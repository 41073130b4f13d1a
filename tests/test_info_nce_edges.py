"""info_nce at its edges: losses near 0, keys that are not near their queries, infinite keys."""

import math

import pytest
import torch
from test_info_nce import fused, make, official
from torch.nn import functional as F

from moco_fast.ops.losses import _info_nce

OP = "info_nce"


@pytest.mark.parametrize("temperature", [0.1, 0.05])
def test_tiny_losses_keep_their_digits(backend, temperature):
    """Positive at 1, negatives at -1: the loss is log1p(K e^{-2/T}), below the rounding of 1 at T = 0.05."""
    q = F.normalize(torch.randn(3, 16), dim=1)
    queue = -q[:1].expand(50, 16).contiguous()
    rows, dq, _ = fused(q[:1], q[:1], queue, temperature)
    want = math.log1p(50 * math.exp(-2 / temperature))
    assert float(rows[0]) == pytest.approx(want, rel=2e-6 / temperature, abs=0)
    assert torch.isfinite(dq).all()


def test_ranks_of_keys_that_are_not_near(backend):
    """Counted in every part of a queue."""
    q, _, queue = make(5, 2500, 16)
    k = torch.randn(5, 16)
    _, _, logits = official(q, k, queue, 0.2)
    _, _, stats = fused(q, k, queue, 0.2)
    pos, neg = logits[:, :1], logits[:, 1:]
    lowest, highest = (neg > pos + 1e-5).sum(1), (neg > pos - 1e-5).sum(1)
    assert ((stats.rank >= lowest) & (stats.rank <= highest)).all() and lowest.max() > 500


@pytest.mark.parametrize("return_stats", [True, False])
@pytest.mark.parametrize("need_dq", [True, False])
@pytest.mark.parametrize("temperature", [0.2, 0.02])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_key_gives_non_finite_losses_whatever_is_wanted(
    backend, value, temperature, need_dq, return_stats
):
    q, k, queue = make(5, 150, 16)
    queue[2, 3] = value
    rows, *_ = _info_nce(q, k, queue, temperature, "high", need_dq, return_stats)
    assert not torch.isfinite(rows).any()


def test_a_queue_of_full_tiles_that_shares_do_not_divide(backend):
    """Eleven tiles of 64 rows: what would follow the last is counted by nobody."""
    q, k, queue = make(5, 11 * 64, 16)
    want, *_ = official(q, k, queue, 0.2)
    rows, *_ = fused(q, k, queue, 0.2)
    assert torch.allclose(rows.double(), want, rtol=1e-4)
