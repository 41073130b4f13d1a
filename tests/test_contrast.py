"""contrast: every backend x dtype x odd shape against autograd of the formula in float64."""

import pytest
import torch
from conftest import with_threads
from features import far
from largest import Largest
from torch.nn import functional as F

import moco_fast
from moco_fast import checks, reference
from moco_fast.ops.losses import _contrast

OP = "contrast"
SHAPES = [(1, 1, 1, 1, 0), (2, 5, 7, 33, 1), (1, 70, 70, 64, 0), (2, 37, 130, 100, 93), (1, 2, 3, 512, 1)]
CASES = [(shape, torch.float32) for shape in SHAPES]  # D, N, M, C, first
CASES += [((2, 9, 20, 100, 5), torch.bfloat16), ((1, 9, 20, 64, 5), torch.float16)]
SCALE = 4096.0  # of the loss, as GradScaler does: fp16 gradients would be subnormal without it


def make(d, n, m, c, first=0, dtype=torch.float32, clustered=False):
    """Raw q and k of norms far from 1; clustered features have a few directions only."""
    centres = F.normalize(torch.randn(4, c, dtype=torch.float64), dim=1)

    def draw(rows):
        noise = torch.randn(d, rows, c, dtype=torch.float64)
        return centres[torch.randint(4, (d, rows))] + 0.05 * noise if clustered else noise

    q, k = draw(n) * 3, draw(m)
    k[:, first : first + n] = 0.3 * q + 0.5 * k[:, first : first + n]
    return q.to(dtype), (k * 0.1).to(dtype)


def formula(q, k, temperature, first=0, dtype=torch.float64):
    """Loss rows, and dq and dk of SCALE times their mean, from the logits, by autograd."""
    q, k = (x.detach().to(dtype).requires_grad_() for x in (q, k))
    logits = F.normalize(q, dim=2) @ F.normalize(k, dim=2).mT / temperature
    target = (torch.arange(q.shape[1]) + first).expand(len(q), -1)
    rows = F.cross_entropy(logits.mT, target, reduction="none")
    return rows.detach(), *torch.autograd.grad(rows.mean() * SCALE, (q, k))


def fused(q, k, temperature, first=0, precision="highest"):
    """The same from the op below contrast(), which has both the loss rows and the gradients."""
    q, k = (x.clone().requires_grad_() for x in (q, k))
    rows, *_ = _contrast(q, k, temperature, first, precision, True, True)
    dq, dk = torch.autograd.grad(rows.mean() * SCALE, (q, k))
    assert rows.dtype == torch.float32 and dq.dtype == dk.dtype == q.dtype
    return rows.detach(), dq, dk


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_error_at_most_twice_eager(backend, shape, dtype, clustered):
    first = shape[4]
    q, k = make(*shape, dtype, clustered)
    want, *gradients = formula(q, k, 0.1, first)
    eager, *eager_gradients = formula(q, k, 0.1, first, torch.float32)
    rows, *found = fused(q, k, 0.1, first)
    assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 2e-6
    rounding = torch.finfo(dtype).eps / 2  # gradients are handed out in the dtype of q and k
    for got, exact, from_eager in zip(found, gradients, eager_gradients, strict=True):
        error, eager_error = (got - exact).norm(), (from_eager - exact).norm()
        # 1e-9: against its own key alone a query has loss 0, and gradient 0
        assert error <= 2 * eager_error + (2e-6 + rounding) * exact.norm() + 1e-9


# What a precision may round the operands of matrix products to; the reference stays in fp32 for all.
OPERAND = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


# Around the temperature at which the Triton kernel changes from a fixed shift to a running maximum.
BORDER = {"highest": (0.16, 0.1599), "high": (0.11, 0.1099), "medium": (0.025, 0.0249)}


@pytest.mark.parametrize(
    ("precision", "temperature"), [(p, t) for p in BORDER for t in (10.0, *BORDER[p], 0.005)]
)
def test_precisions_and_temperatures(backend, precision, temperature):
    """Two rounded operands move a cosine by at most eps, which T divides; rounded weights add another eps."""
    q, k = make(1, 20, 40, 40, clustered=True)
    k = k[:, torch.randperm(40)]  # not near q, or at such temperatures no loss would be left
    want, *gradients = formula(q, k, temperature, 7)
    eager, *_ = formula(q, k, temperature, 7, torch.float32)
    rows, *found = fused(q, k, temperature, 7, precision)
    bound = torch.finfo(OPERAND[precision]).eps * (1 + 1 / temperature)
    assert (rows - want).abs().max() <= bound + 1e-5 + 2 * (eager - want).abs().max()
    for got, exact in zip(found, gradients, strict=True):
        assert relative(got, exact) <= bound + 1e-5


@pytest.mark.parametrize("temperature", [0.05, *(BORDER[p][0] for p in ("high", "highest")), 0.2])
@pytest.mark.parametrize("cosine", [-0.4, -0.95])
@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_queries_far_from_all_keys(backend, precision, cosine, temperature):
    """Under a fixed shift all their exponentials are small, and fp16 has few digits for small values."""
    q, _, k = far(cosine, 20, 40, 64)
    q, k = q[None], k[None]
    want, *gradients = formula(q, k, temperature, 7)
    rows, *found = fused(q, k, temperature, 7, precision)
    eps = torch.finfo(OPERAND[precision]).eps
    assert (rows - want).abs().max() <= eps / temperature + 1e-5
    for got, exact in zip(found, gradients, strict=True):
        assert relative(got, exact) <= 4 * eps + 2e-6


@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_tiny_losses_keep_their_digits(backend, precision):
    """Keys at cosine 1, negatives at 0: the loss is log1p((N - 1) e^{-1/T}), below the logits' rounding."""
    x = torch.eye(20)[None] * 2
    rows, *found = fused(x, x, 0.05, 0, precision)
    want = torch.log1p(19 * torch.exp(torch.tensor(-1 / 0.05, dtype=torch.float64)))
    assert torch.allclose(rows.double(), want.expand(1, 20), rtol=2e-5, atol=0)
    # Weights of 2^-29 are subnormal in fp16, where gradients keep fewer digits than the loss.
    for got, exact in zip(found, formula(x, x, 0.05)[1:], strict=True):
        assert relative(got, exact) <= max(1e-3, torch.finfo(OPERAND[precision]).eps)


@pytest.mark.parametrize("features", [17, 128, 512])
def test_collapsed_batch(backend, features):
    """Rows that are all equal: every logit is rounded alike, and the loss is log(M) to the last digits."""
    x = torch.randn(features).expand(1, 70, features)
    rows, *_ = fused(x, x, 0.07)
    bound = (
        1e-4 if backend == "triton" else 1e-6
    )  # 1e-4: pairs of fp16 and the fp32 positive differ by 2^-22 / T
    assert (rows.double() - torch.tensor(70.0).double().log()).abs().max() < bound


@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_short_rows_follow_normalize(backend, norm):
    """Below 1e-12 a row is divided by that, a constant through which no gradient flows."""
    q, k = make(1, 4, 6, 8)
    q[0, 1] *= norm / q[0, 1].norm()
    k[0, 2] *= norm / k[0, 2].norm()
    want, *gradients = formula(q, k, 0.5, 1)
    rows, *found = fused(q, k, 0.5, 1)
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    for got, exact, short in zip(found, gradients, (1, 2), strict=True):
        assert (
            relative(got[0, short], exact[0, short]) < 1e-5
        )  # 1e12 times a unit gradient, as F.normalize gives
        others = [i for i in range(got.shape[1]) if i != short]
        assert relative(got[0, others], exact[0, others]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_non_finite_rows_give_non_finite_losses(backend, value, temperature):
    """A query's loss, or the losses of all queries of a key's problem, and of no other."""
    q, k = make(2, 5, 7, 32)
    q[0, 1, 3] = value
    rows, dq, _ = fused(q, k, temperature)
    assert torch.isfinite(rows).tolist() == [[i != 1 for i in range(5)], [True] * 5]
    assert torch.isfinite(dq[0, 2:]).all() and torch.isfinite(dq[1]).all()
    q, k = make(2, 5, 7, 32)
    k[1, 6, 3] = value
    rows, dq, dk = fused(q, k, temperature)
    assert torch.isfinite(rows).tolist() == [[True] * 5, [False] * 5]
    assert torch.isfinite(dq[0]).all() and torch.isfinite(dk[0]).all()


def test_non_contiguous_views(backend):
    q, k = make(2, 6, 9, 33)
    want = fused(q, k, 0.5)
    wide = torch.full((2, 6, 66), float("nan"))
    wide[..., ::2] = q
    for views in [(wide[..., ::2], k), (q, k.mT.contiguous().mT)]:
        got = fused(*views, 0.5)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-3) for a, b in zip(got, want, strict=True))


def test_bitwise_repeatable(backend):
    q, k = make(1, 60, 200, 40)  # several shares of the columns
    first, again = fused(q, k, 0.1), fused(q, k, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_instruction_sets_and_threads(isa):
    """Every instruction set this CPU has, each with the same bits from any number of threads."""
    q, k = make(2, 150, 301, 100, 40)  # several tiles and blocks, enough for several threads
    want = formula(q, k, 0.1, 40)
    got = with_threads(lambda: fused(q, k, 0.1, 40))
    assert all(relative(*pair) < 5e-6 for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("block", [1, 3 * 2 * 31, 2 * 31 * 20], ids=["rows", "a rest", "whole"])
def test_reference_in_blocks(monkeypatch, block, needs):
    """Queries a few at a time: the same numbers, whatever is asked for."""
    q, k = make(2, 20, 31, 16, 5, torch.float64, clustered=True)
    arguments = (q, k, 0.1, 5, "highest", *needs)
    want = reference.contrast(*arguments)
    monkeypatch.setattr("moco_fast.reference.losses.BLOCK", block)
    found, again = reference.contrast(*arguments), reference.contrast(*arguments)
    for got, repeated, exact in zip(found, again, want, strict=True):
        assert torch.equal(got, repeated)
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained_keys", [False, True])
def test_reference_holds_no_logits_of_a_batch_of_4096(trained_keys):
    """Both directions of MoCo v3: 2 x 4096 x 4096 logits, of which an eighth at a time are in memory."""
    q, k = torch.randn(2, 2, 4096, 8)
    with Largest() as largest:
        reference.contrast(q, k, 1.0, 0, "high", True, trained_keys)
    assert 2**20 < largest.elements <= 2**22


def test_two_directions_are_two_problems(backend):
    q, k = make(2, 6, 9, 32)
    both = moco_fast.contrast(q, k, 0.2, first=2, reduction="none")
    for d in range(2):
        one = moco_fast.contrast(q[d], k[d], 0.2, first=2, reduction="none")
        assert one.shape == (6,) and torch.allclose(both[d], one, rtol=1e-6)
    assert torch.allclose(both.mean(), moco_fast.contrast(q, k, 0.2, first=2))


def test_frozen_keys_and_weighted_rows(backend):
    q, k = make(2, 6, 9, 32)
    weights = torch.rand(2, 6)
    _, want, _ = formula(q, k, 0.5)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(moco_fast.contrast(q, k, 0.5, precision="highest"), q)
    assert relative(dq * SCALE, want) < 1e-5
    rows = moco_fast.contrast(q, k, 0.5, precision="highest", reduction="none")
    (weighted,) = torch.autograd.grad((rows * weights).sum(), q)
    assert relative(weighted, want * weights[..., None] * 12 / SCALE) < 1e-5


def test_gradient_to_the_keys_alone(backend):
    q, k = make(1, 6, 9, 32)
    _, _, want = formula(q, k, 0.5)
    moco_fast.contrast(q[0], k[0].requires_grad_(), 0.5, precision="highest", reduction="sum").backward()
    assert q.grad is None
    k = k.detach()[0].requires_grad_()
    (dk,) = torch.autograd.grad(
        moco_fast.contrast(q[0], k, 0.5, precision="highest", reduction="sum") * SCALE, k
    )
    assert relative(dk, want[0] * 6) < 1e-5


@pytest.mark.parametrize(("need_dq", "need_dk"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_output_is_written(backend, need_dq, need_dk):
    q, k = make(2, 9, 12, 40)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        rows, dq, dk = _contrast(q, k, 0.1, 3, "highest", need_dq, need_dk)
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.shape == (2, 9)
    assert dq.shape == (2, 9 if need_dq else 0, 40) and dk.shape == (2, 12 if need_dk else 0, 40)
    assert all(torch.isfinite(x).all() for x in (rows, dq, dk))


def test_autocast_does_not_matter(backend):
    q, k = make(1, 9, 12, 32)
    want = fused(q, k, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(q, k, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("of", ["q", "k"])
def test_second_derivative_raises(backend, of):
    inputs = dict(zip("qk", (x[0] for x in make(1, 5, 6, 8)), strict=True))
    x = inputs[of].requires_grad_()
    (grad,) = torch.autograd.grad(moco_fast.contrast(**inputs), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.pow(2).sum().backward()


def test_gradcheck_in_float64():
    q, k = (x.requires_grad_() for x in make(2, 4, 6, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda q, k: moco_fast.contrast(q, k, 0.3, first=1), (q, k))
    k = k.detach()
    assert torch.autograd.gradcheck(lambda q: moco_fast.contrast(q, k, 0.3, reduction="none"), q)


def test_opcheck(backend):
    q, k = make(1, 5, 6, 8)
    torch.library.opcheck(_contrast, (q, k, 0.1, 1, "high", False, False))
    q, k = q.requires_grad_(), k.requires_grad_()
    torch.library.opcheck(_contrast, (q, k, 0.1, 1, "high", True, True))


def test_compile_fullgraph(backend):
    q, k = (x[0].requires_grad_() for x in make(1, 5, 6, 8))

    def step(q, k):
        return moco_fast.contrast(q * 2, k * 3, 0.1, first=1)

    want = torch.autograd.grad(step(q, k), (q, k))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k), (q, k))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, want, strict=True))


def test_what_the_kernels_do_not_serve(triton_device):
    x = torch.randn(2, 513, device=triton_device)
    with moco_fast.use_backend("triton"), pytest.raises(RuntimeError, match=r"up to 512 features.*got 513"):
        moco_fast.contrast(x, x)
    with moco_fast.use_backend("native"), pytest.raises(RuntimeError, match=r"cannot serve contrast: it"):
        moco_fast.contrast(x.double(), x.double())
    assert torch.isfinite(moco_fast.contrast(x, x))


def bad(**changes):
    return {"q": torch.zeros(4, 8), "k": torch.zeros(6, 8), "temperature": 0.5} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "q must have a floating-point.*int64"),
        ({"k": [[1.0]]}, TypeError, "k must be a torch.Tensor, got list"),
        ({"q": torch.zeros(8)}, ValueError, r"q must have 2 dimensions.*\(8,\)"),
        ({"q": torch.zeros(2, 4, 8)}, ValueError, r"k must have 3 dimensions.*\(6, 8\)"),
        ({"q": torch.zeros(0, 8)}, ValueError, r"q must hold at least one row.*\(0, 8\)"),
        (
            {"k": torch.zeros(6, 9)},
            ValueError,
            r"k must have shape \(M, 8\) to match q \(4, 8\), got \(6, 9\)",
        ),
        (
            {"q": torch.zeros(2, 4, 8), "k": torch.zeros(3, 6, 8)},
            ValueError,
            r"k must have shape \(2, M, 8\).*\(3, 6, 8\)",
        ),
        ({"k": torch.zeros(3, 8)}, ValueError, "k must hold a key for each of the 4 queries, got 3"),
        ({"k": torch.zeros(6, 8).half()}, TypeError, "k must have the dtype of q.*float16"),
        ({"k": torch.zeros(6, 8, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
        ({"first": 3}, ValueError, r"first.*\[0, 2\] for 4 queries and 6 keys, got 3"),
        ({"first": -1}, ValueError, r"first.*\[0, 2\].*got -1"),
        ({"first": True}, TypeError, "first must be an integer, got bool True"),
        ({"first": torch.arange(4)}, TypeError, "first must be an integer, got Tensor"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature.*nan"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'highest'.*got 'fp8'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean'.*got 'max'"),
        (
            {"k": torch.zeros(6, 8, requires_grad=True), "reduction": "none"},
            ValueError,
            "reduction must be 'mean' or 'sum' where a gradient is wanted, got 'none'",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        moco_fast.contrast(**bad(**changes))
