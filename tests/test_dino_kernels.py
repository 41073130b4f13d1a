"""dino's Triton kernels: what depends on the GPU they run on."""

import pytest
import torch
from conftest import interpreter_fault
from test_dino_op import fused, make, relative

import moco_fast
from moco_fast import checks
from moco_fast.kernels import backend as triton


@pytest.fixture
def kernels():
    """The Triton kernels' file, where it can run; skips, by name, where not."""
    if reason := triton.cannot_serve("dino", (torch.empty((1, 1)),)) or interpreter_fault():
        pytest.skip(reason)
    from moco_fast.kernels import dino

    with moco_fast.use_backend("triton"):
        yield dino


@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_pointers_give_the_same_bits_as_descriptors(kernels, precision, monkeypatch):
    """What GPUs before Hopper run."""
    inputs = make(20, 70, 37)
    want = fused(*inputs, precision=precision)
    monkeypatch.setattr(kernels, "has_tma", lambda device: False)
    monkeypatch.setattr(kernels, "OLDER_TILES", {})  # other tiles would add up in another order
    got = fused(*inputs, precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("features", [64, 256, 512])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_older_tiles(kernels, precision, features, monkeypatch):
    inputs = make(5, 40, features)
    want = fused(*inputs, precision=precision)
    monkeypatch.setattr(kernels, "has_tma", lambda device: False)
    got = fused(*inputs, precision=precision)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=0)
    # weights are rounded to fp16
    assert all(relative(a, b) <= 2e-3 for a, b in zip(got[1:], want[1:], strict=True))


def test_prototypes_in_the_operand_type_are_read_where_they_are(kernels):
    from moco_fast.kernels.operands import operand

    rows = torch.randn(9, 40).half()
    high, low = operand(rows[None], "high", unit=False)
    assert high.data_ptr() == low.data_ptr() == rows.data_ptr() and high.shape == rows.shape
    for x in (rows[:, :39], rows[:, ::2], rows.flatten()[1:321].view(8, 40), rows.float(), rows.bfloat16()):
        found = operand(x[None], "high", unit=False).high
        assert found.data_ptr() % 16 == 0 and found.shape[1] % 8 == 0 and found.is_contiguous()
        assert torch.equal(found[:, : x.shape[1]], x.half()) and not found[:, x.shape[1] :].any()


@pytest.mark.parametrize("shape", [(64, 70, 32), (5, 320, 64)], ids=str)
def test_tiles_that_do_not_come_out_even(kernels, shape):
    """Full tiles of rows but not of prototypes; full tiles of prototypes, but not as many in every share."""
    inputs = make(*shape)
    got = fused(*inputs, precision="highest")
    with moco_fast.use_backend("reference"):
        want = fused(*inputs, precision="highest")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert all(relative(a, b) <= 1e-4 for a, b in zip(got[1:], want[1:], strict=True))
