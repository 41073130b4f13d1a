"""nt_xent: every backend x dtype x odd shape against autograd of the formula in float64."""

import pytest
import torch
from conftest import with_threads
from largest import Largest
from torch.nn import functional as F

import moco_fast
from moco_fast import checks, reference
from moco_fast.ops.losses import _nt_xent

OP = "nt_xent"
SHAPES = [(1, 1), (5, 33), (37, 100), (70, 64), (3, 512)]
CASES = [(shape, torch.float32) for shape in SHAPES] + [((37, 100), torch.bfloat16), ((9, 64), torch.float16)]
SCALE = 4096.0  # of the loss, as GradScaler does: fp16 gradients would be subnormal without it


def make(n, c, dtype=torch.float32, clustered=False):
    """Two raw views of norms far from 1; clustered features have a few directions only."""
    draw = torch.randn(n, c, dtype=torch.float64)
    if clustered:
        centres = F.normalize(torch.randn(4, c, dtype=torch.float64), dim=1)
        draw = centres[torch.randint(4, (n,))] + 0.05 * draw
    z1 = draw * 3
    z2 = (z1 + 0.5 * torch.randn(n, c, dtype=torch.float64) * draw.abs().mean()) * 0.1
    return z1.to(dtype), z2.to(dtype)


def formula(z1, z2, temperature, dtype=torch.float64):
    """Loss rows, and the gradients of SCALE times their mean, from the logits, by autograd."""
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    logits = (z @ z.t() / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    rows = F.cross_entropy(logits, torch.arange(2 * n).roll(n), reduction="none")
    gradients = torch.autograd.grad(rows.mean() * SCALE, (z1, z2))
    return rows.detach(), torch.cat(gradients)


def fused(z1, z2, temperature, precision="highest"):
    """The same from the op below nt_xent(), which has both the loss rows and a gradient."""
    z = torch.cat([z1, z2]).requires_grad_()
    rows, _ = _nt_xent(z, temperature, precision, True)
    (dz,) = torch.autograd.grad(rows.mean() * SCALE, z)
    assert rows.dtype == torch.float32 and dz.dtype == z.dtype
    return rows.detach(), dz


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_error_at_most_twice_eager(backend, shape, dtype, clustered):
    z1, z2 = make(*shape, dtype, clustered)
    want, want_dz = formula(z1, z2, 0.1)
    eager, eager_dz = formula(z1, z2, 0.1, torch.float32)
    rows, dz = fused(z1, z2, 0.1)
    assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 2e-6
    rounding = torch.finfo(dtype).eps / 2  # gradients are handed out in the dtype of z
    error, eager_error = (dz - want_dz).norm(), (eager_dz - want_dz).norm()
    # 1e-9: of one image there is nothing to tell apart, the loss is 0 and its gradient too
    assert error <= 2 * eager_error + (2e-6 + rounding) * want_dz.norm() + 1e-9


# What a precision may round the operands of matrix products to; the reference stays in fp32 for all.
OPERAND = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


# Around the temperature at which the Triton kernel changes from a fixed shift to a running maximum.
@pytest.mark.parametrize("temperature", [10.0, 0.025, 0.0249, 0.005])
@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_precisions_and_temperatures(backend, precision, temperature):
    """Two rounded operands move a cosine by at most eps, which T divides; rounded weights add another eps."""
    z1, z2 = make(20, 40, clustered=True)
    z2 = z2[torch.randperm(len(z2))]  # not near z1, or at such temperatures no loss would be left
    want, want_dz = formula(z1, z2, temperature)
    eager, _ = formula(z1, z2, temperature, torch.float32)
    rows, dz = fused(z1, z2, temperature, precision)
    bound = torch.finfo(OPERAND[precision]).eps * (1 + 1 / temperature)
    assert (rows - want).abs().max() <= bound + 1e-5 + 2 * (eager - want).abs().max()
    assert relative(dz, want_dz) <= bound + 1e-5


@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_tiny_losses_keep_their_digits(backend, precision):
    """Views at cosine 1, negatives at 0: the loss is log1p((2N - 2) e^{-1/T}), below the logits' rounding."""
    z = torch.eye(20) * 2
    rows, dz = fused(z, z, 0.05, precision)
    want = torch.log1p(38 * torch.exp(torch.tensor(-1 / 0.05, dtype=torch.float64)))
    assert torch.allclose(rows.double(), want.expand(40), rtol=2e-5, atol=0)
    _, want_dz = formula(z, z, 0.05)
    # Weights of 2^-29 are subnormal in fp16, where the gradient keeps fewer digits than the loss.
    assert relative(dz, want_dz) <= max(1e-3, torch.finfo(OPERAND[precision]).eps)


@pytest.mark.parametrize("features", [17, 128, 512])
def test_collapsed_batch(backend, features):
    """Rows that are all equal: logits are rounded alike, and the loss is log(2N - 1) to the last digits."""
    z = torch.randn(features).expand(35, features)
    rows, _ = fused(z, z, 0.07)
    bound = (
        1e-4 if backend == "triton" else 1e-6
    )  # 1e-4: pairs of fp16 and the fp32 positive differ by 2^-22 / T
    assert (rows.double() - torch.tensor(69.0).double().log()).abs().max() < bound


@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_short_rows_follow_normalize(backend, norm):
    """Below 1e-12 a row is divided by that, a constant through which no gradient flows."""
    z1, z2 = make(4, 8)
    z1[1] *= norm / z1[1].norm()
    want, want_dz = formula(z1, z2, 0.5)
    rows, dz = fused(z1, z2, 0.5)
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    assert relative(dz[1], want_dz[1]) < 1e-5  # 1e12 times a unit gradient, as F.normalize gives
    others = [0, *range(2, 8)]
    assert relative(dz[others], want_dz[others]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_non_finite_rows_give_non_finite_losses(backend, value, temperature):
    z1, z2 = make(5, 32)
    z1[2, 3] = value
    rows, _ = fused(z1, z2, temperature)
    assert not torch.isfinite(rows).any()  # the row is a negative, or the positive, of every other


def test_non_contiguous_views(backend):
    z1, z2 = make(6, 33)
    want = fused(z1, z2, 0.5)
    wide = torch.full((6, 66), float("nan"))
    wide[:, ::2] = z1
    for views in [(wide[:, ::2], z2), (z1, z2.t().contiguous().t())]:
        got = fused(*views, 0.5)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_bitwise_repeatable(backend):
    z1, z2 = make(100, 40)  # several shares of the columns
    first = fused(z1, z2, 0.1)
    again = fused(z1, z2, 0.1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_instruction_sets_and_threads(isa):
    """Every instruction set this CPU has, each with the same bits from any number of threads."""
    z1, z2 = make(150, 100)  # several tiles and blocks, enough for several threads
    want = formula(z1, z2, 0.1)
    got = with_threads(lambda: fused(z1, z2, 0.1))
    assert all(relative(*pair) < 5e-6 for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("need_dz", [True, False])
@pytest.mark.parametrize("block", [1, 7 * 40, 40 * 40], ids=["rows", "a rest", "whole"])
def test_reference_in_blocks(monkeypatch, block, need_dz):
    """Views a few at a time: the same numbers, whatever is asked for."""
    z = torch.cat(make(20, 16, torch.float64, clustered=True))
    want = reference.nt_xent(z, 0.1, "highest", need_dz)
    monkeypatch.setattr("moco_fast.reference.losses.BLOCK", block)
    found, again = (reference.nt_xent(z, 0.1, "highest", need_dz) for _ in range(2))
    for got, repeated, exact in zip(found, again, want, strict=True):
        assert torch.equal(got, repeated)
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("block", [2**16, 2**18])
def test_reference_holds_no_logits_of_a_batch(monkeypatch, block):
    """Of 1024 x 1024 similarities no more than a block is in memory."""
    monkeypatch.setattr("moco_fast.reference.losses.BLOCK", block)
    with Largest() as largest:
        reference.nt_xent(torch.randn(1024, 8), 0.5, "high", True)
    assert largest.elements == block


def test_reductions_and_gradient_scale(backend):
    z1, z2 = make(6, 32)
    rows = moco_fast.nt_xent(z1, z2, reduction="none")
    assert rows.shape == (12,) and rows.grad_fn is None
    want, want_dz = formula(z1, z2, 0.5)
    assert torch.allclose(rows.double(), want, atol=1e-3)
    views = (z1.requires_grad_(), z2.requires_grad_())
    mean, total = moco_fast.nt_xent(z1, z2), moco_fast.nt_xent(z1, z2, reduction="sum")
    assert torch.equal(mean, rows.mean()) and torch.equal(total, rows.sum())
    of_mean, of_sum = torch.autograd.grad(mean * SCALE, views), torch.autograd.grad(total * 5, views)
    assert relative(torch.cat(of_mean), want_dz) < 2e-3
    assert relative(torch.cat(of_sum), want_dz * 60 / SCALE) < 2e-3


def test_gradient_to_one_view_alone(backend):
    z1, z2 = make(6, 32)
    _, want = formula(z1, z2, 0.5)
    moco_fast.nt_xent(z1, z2.requires_grad_(), precision="highest").backward()
    assert z1.grad is None and relative(z2.grad * SCALE, want[6:]) < 1e-5


@pytest.mark.parametrize("need_dz", [True, False])
def test_every_output_is_written(backend, need_dz):
    z = torch.randn(18, 40)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        rows, dz = _nt_xent(z, 0.1, "highest", need_dz)
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.shape == (18,) and dz.shape == (18 if need_dz else 0, 40)
    assert torch.isfinite(rows).all() and torch.isfinite(dz).all()


def test_autocast_does_not_matter(backend):
    z1, z2 = make(9, 32)
    want = fused(z1, z2, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(z1, z2, 0.1)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_second_derivative_raises(backend):
    z1, z2 = make(5, 8)
    z1.requires_grad_()
    (grad,) = torch.autograd.grad(moco_fast.nt_xent(z1, z2), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.pow(2).sum().backward()


def test_gradcheck_in_float64():
    views = [z.requires_grad_() for z in make(4, 6, torch.float64)]
    assert torch.autograd.gradcheck(lambda z1, z2: moco_fast.nt_xent(z1, z2, 0.3), views)


def test_opcheck(backend):
    z = torch.randn(10, 8)
    torch.library.opcheck(_nt_xent, (z.clone().requires_grad_(), 0.1, "high", True))
    torch.library.opcheck(_nt_xent, (z, 0.1, "high", False))


def test_compile_fullgraph(backend):
    z1, z2 = make(5, 8)

    def step(z1):
        return moco_fast.nt_xent(z1 * 2, z2, 0.1)

    z1.requires_grad_()
    (want,) = torch.autograd.grad(step(z1), z1)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(z1), z1)
    assert torch.allclose(got, want, rtol=1e-6)


def test_what_the_kernels_do_not_serve(triton_device):
    z = torch.randn(2, 513, device=triton_device)
    with moco_fast.use_backend("triton"), pytest.raises(RuntimeError, match=r"up to 512 features.*got 513"):
        moco_fast.nt_xent(z, z)
    with moco_fast.use_backend("native"), pytest.raises(RuntimeError, match=r"cannot serve nt_xent: it"):
        moco_fast.nt_xent(z.double(), z.double())
    assert torch.isfinite(moco_fast.nt_xent(z, z))


def bad(**changes):
    return {"z1": torch.zeros(4, 8), "z2": torch.zeros(4, 8), "temperature": 0.5} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z1": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "z1 must have a floating-point.*int64"),
        ({"z2": [[1.0]]}, TypeError, "z2 must be a torch.Tensor, got list"),
        ({"z1": torch.zeros(8)}, ValueError, r"z1 must have 2 dimensions.*\(8,\)"),
        ({"z1": torch.zeros(0, 8), "z2": torch.zeros(0, 8)}, ValueError, r"z1.*at least one row.*\(0, 8\)"),
        ({"z2": torch.zeros(3, 8)}, ValueError, r"z2 must have the shape of z1, \(4, 8\), got \(3, 8\)"),
        ({"z2": torch.zeros(4, 8).half()}, TypeError, "z2 must have the dtype of z1.*float16"),
        ({"z2": torch.zeros(4, 8, device="meta")}, ValueError, "z2 is on meta, but z1 is on cpu"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature.*nan"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'highest'.*got 'fp8'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean'.*got 'max'"),
        (
            {"z2": torch.zeros(4, 8, requires_grad=True), "reduction": "none"},
            ValueError,
            "reduction must be 'mean' or 'sum' where a gradient is wanted, got 'none'",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        moco_fast.nt_xent(**bad(**changes))
