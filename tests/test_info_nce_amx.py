"""info_nce at precision "medium" on a CPU's matrix units for bf16; test_bounds.py emulates them elsewhere."""

import math

import pytest
import torch
from conftest import with_threads
from test_info_nce import make
from torch.nn import functional as F

from moco_fast import native

T = 0.1


@pytest.fixture
def units():
    if not native.has_bf16_units():
        pytest.skip("bf16 matrix units: this CPU or build has none")


def info_nce(q, k, queue, precision="medium", need_dq=True):
    return native.info_nce(q, k, queue, T, precision, need_dq, True)


@pytest.mark.parametrize("need_dq", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3), (37, 5000, 64), (130, 2049, 33), (257, 700, 512)], ids=str)
def test_matrix_units(units, shape, dtype, need_dq):
    """Against operands rounded beforehand, for tiles whole and cut; the same bits from any threads."""
    q, k, queue = make(*shape, clustered=True)
    queue = queue.to(dtype)
    loss, dq, _, pos, neg = with_threads(lambda: info_nce(q, k, queue, need_dq=need_dq))
    q_hat, k_hat = (F.normalize(x.double(), dim=1) for x in (q, k))
    rows = queue.float().bfloat16().double()
    cosines = torch.cat(
        [(q_hat * k_hat).sum(1, keepdim=True), q_hat.float().bfloat16().double() @ rows.t()], 1
    )
    want = (cosines / T).logsumexp(1) - cosines[:, 0] / T
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pos.double(), cosines[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(neg.double(), cosines[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    assert not torch.equal(neg, info_nce(q, k, queue, "high")[4])
    if not need_dq:
        assert dq.numel() == 0
        return
    p = (cosines / T).softmax(1)[:, 1:]
    d_hat = (p @ rows - p.sum(1, keepdim=True) * k_hat) / T
    want = (d_hat - (d_hat * q_hat).sum(1, keepdim=True) * q_hat) / q.double().norm(dim=1, keepdim=True)
    # The exponentials are rounded too: each by at most half a unit in the last place.
    bound = torch.finfo(torch.bfloat16).eps / 2 * p.sum(1) / T / q.double().norm(dim=1)
    assert ((dq - want).norm(dim=1) <= 1.01 * bound * rows.norm(dim=1).max()).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("need_dq", [True, False])
def test_matrix_units_hide_nothing(units, value, need_dq):
    q, k, queue = make(5, 300, 40)
    queue[257, 33] = value
    assert not info_nce(q, k, queue, need_dq=need_dq)[0].isfinite().any()


def test_units_beside_avx512_alone(isa):
    if native.has_bf16_units():
        assert isa == "avx512"
        return
    q, k, queue = make(9, 300, 32)
    for high, medium in zip(info_nce(q, k, queue, "high"), info_nce(q, k, queue), strict=True):
        assert torch.equal(high, medium)
