"""info_nce: every backend x dtype x odd shape against autograd of the official formula in float64."""

import pytest
import torch
from conftest import with_threads
from features import far
from torch.nn import functional as F

import moco_fast
from moco_fast import checks
from moco_fast.ops.losses import _info_nce

OP = "info_nce"
SHAPES = [(1, 1, 1), (1, 7, 5), (5, 63, 32), (37, 300, 128), (70, 130, 100), (5, 515, 256), (3, 70, 512)]
SCALE = 4096.0  # of the loss, as GradScaler does: fp16 gradients would be subnormal without it
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(n, k, c, dtype=torch.float32, clustered=False, queue_dtype=torch.float32):
    """Raw q and k of norms far from 1, unit queue rows; clustered features have a few directions only."""
    if clustered:
        centres = F.normalize(torch.randn(4, c, dtype=torch.float64), dim=1)

        def draw(rows):
            return centres[torch.randint(4, (rows,))] + 0.05 * torch.randn(rows, c, dtype=torch.float64)
    else:

        def draw(rows):
            return torch.randn(rows, c, dtype=torch.float64)

    q = draw(n) * 3
    keys = (q + 0.5 * draw(n)) * 0.1
    queue = F.normalize(draw(k), dim=1)
    return q.to(dtype), keys.to(dtype), queue.to(queue_dtype)


def official(q, k, queue, temperature, dtype=torch.float64):
    """Loss rows and dq of SCALE times the mean loss, from the logits, by autograd."""
    q = q.detach().to(dtype).requires_grad_()
    q_hat, k_hat = F.normalize(q, dim=1), F.normalize(k.to(dtype), dim=1)
    logits = torch.cat([(q_hat * k_hat).sum(1, keepdim=True), q_hat @ queue.to(dtype).t()], dim=1)
    rows = F.cross_entropy(logits / temperature, torch.zeros(len(q), dtype=torch.long), reduction="none")
    (dq,) = torch.autograd.grad(rows.mean() * SCALE, q)
    return rows.detach(), dq, logits.detach()


def fused(q, k, queue, temperature, precision="highest"):
    q = q.clone().requires_grad_()
    rows, stats = moco_fast.info_nce(
        q, k, queue, temperature, precision=precision, reduction="none", return_stats=True
    )
    (dq,) = torch.autograd.grad(rows.mean() * SCALE, q)
    assert rows.dtype == torch.float32 and dq.dtype == q.dtype
    return rows.detach(), dq, stats


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_at_most_twice_eager(backend, shape, dtype, clustered):
    q, k, queue = make(*shape, dtype, clustered)
    want, want_dq, logits = official(q, k, queue, 0.07)
    eager, eager_dq, _ = official(q, k, queue, 0.07, torch.float32)
    rows, dq, stats = fused(q, k, queue, 0.07)

    assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 2e-6
    rounding = torch.finfo(dtype).eps / 2  # dq is handed out in the dtype of q
    assert relative(dq, want_dq) <= 2 * relative(eager_dq, want_dq) + 2e-6 + rounding

    # statistics: a rank may differ only by negatives that tie with the positive to rounding
    pos, neg = logits[:, :1], logits[:, 1:]
    assert torch.allclose(stats.pos.double(), pos[:, 0], atol=1e-6)
    assert torch.allclose(stats.neg.double(), neg.mean(1), atol=1e-6)
    lowest, highest = (neg > pos + 1e-5).sum(1), (neg > pos - 1e-5).sum(1)
    assert ((stats.rank >= lowest) & (stats.rank <= highest)).all()


@pytest.mark.parametrize("queue_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_queue(backend, queue_dtype):
    q, k, queue = make(37, 300, 128, queue_dtype=queue_dtype)
    want, want_dq, _ = official(q, k, queue, 0.07)
    rows, dq, _ = fused(q, k, queue, 0.07)
    assert (rows - want).abs().max() < 5e-6
    assert relative(dq, want_dq) < 5e-6


@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.07, 0.5, 1.0, 10.0])
def test_temperatures(backend, temperature):
    for clustered in (False, True):
        q, k, queue = make(37, 300, 64, clustered=clustered)
        want, want_dq, _ = official(q, k, queue, temperature)
        eager, eager_dq, _ = official(q, k, queue, temperature, torch.float32)
        rows, dq, _ = fused(q, k, queue, temperature)
        assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 2e-6 / temperature
        # 1e-30: where the positive wins by e^-100, gradients are subnormal, for eager and fused alike
        error, eager_error = (dq - want_dq).norm(), (eager_dq - want_dq).norm()
        assert error <= 2 * eager_error + 1e-6 / temperature * want_dq.norm() + 1e-30


def test_rows_of_any_norm(backend):
    q, k, _ = make(9, 1, 32)
    queue = torch.randn(300, 32) * torch.logspace(-3, 2, 300)[:, None]
    want, want_dq, _ = official(q, k, queue, 0.07)
    rows, dq, _ = fused(q, k, queue, 0.07)
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    assert relative(dq, want_dq) < 1e-5


@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_short_rows_follow_normalize(backend, norm):
    """Below 1e-12 a row is divided by that, a constant through which no gradient flows."""
    q, k, queue = make(4, 50, 8)
    q[1] *= norm / q[1].norm()
    want, want_dq, _ = official(q, k, queue, 0.5)
    rows, dq, _ = fused(q, k, queue, 0.5)
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    assert relative(dq[1], want_dq[1]) < 1e-5  # 1e12 times a unit gradient, as F.normalize gives
    assert relative(dq[[0, 2, 3]], want_dq[[0, 2, 3]]) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "queue"])
def test_non_finite_rows_give_a_non_finite_loss(backend, where, value):
    q, k, queue = make(5, 200, 32)
    {"q": q, "k": k, "queue": queue}[where][2, 3] = value
    rows, _, _ = fused(q, k, queue, 0.07)
    touched = ~torch.isfinite(rows)
    assert touched.all() if where == "queue" else touched.tolist() == [False, False, True, False, False]
    with pytest.raises(ValueError, match=rf"{where} must be finite.*\(2, 3\)"):
        checks.finite(q=q, k=k, queue=queue)


def test_non_contiguous_views(backend):
    q, k, queue = make(6, 90, 33)
    want = fused(q, k, queue, 0.07)
    wide = torch.full((6, 66), float("nan"))
    wide[:, ::2] = q
    for views in [
        (wide[:, ::2], k, queue),
        (q, k.t().contiguous().t(), queue),
        (q, k, queue.t().contiguous().t()),
    ]:
        got = fused(*views, 0.07)
        assert torch.allclose(got[0], want[0], rtol=1e-6) and torch.allclose(got[1], want[1], atol=1e-7)


def test_bitwise_repeatable(backend):
    q, k, queue = make(20, 301, 128)
    first = fused(q, k, queue, 0.07)
    for _ in range(2):
        again = fused(q, k, queue, 0.07)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_reductions_and_gradient_scale(backend):
    q, k, queue = make(6, 90, 32)
    rows = moco_fast.info_nce(q, k, queue, reduction="none")
    assert rows.shape == (6,) and rows.grad_fn is None
    assert torch.allclose(moco_fast.info_nce(q, k, queue), rows.mean())
    assert torch.allclose(moco_fast.info_nce(q, k, queue, reduction="sum"), rows.sum())
    q.requires_grad_()
    (mean,) = torch.autograd.grad(moco_fast.info_nce(q, k, queue), q)
    (scaled,) = torch.autograd.grad(moco_fast.info_nce(q, k, queue, reduction="sum") * 5, q)
    assert torch.allclose(scaled, mean * 30, rtol=1e-5)


def test_queue_may_change_before_backward(backend):
    q, k, queue = make(6, 90, 32)
    _, want, _ = official(q, k, queue, 0.07)
    q.requires_grad_()
    loss = moco_fast.info_nce(q, k, queue, 0.07, precision="highest") * SCALE
    queue.fill_(float("nan"))
    loss.backward()
    assert relative(q.grad, want) < 1e-5


# What a precision may round the operands of matrix products to; the CPU backends stay in fp32 for "high".
OPERAND = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
# Around the temperatures at which the Triton kernel changes from a fixed shift to a running maximum.
TEMPERATURES = [0.2, 0.1, 0.0999, 0.06, 0.0599, 0.025, 0.0249, 0.01]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_precisions(backend, precision, temperature):
    """Two rounded operands move a cosine by at most eps, and cosines are divided by T."""
    for clustered in (False, True):
        q, k, queue = make(20, 300, 64, clustered=clustered)
        k = k[torch.randperm(len(k))]  # not near q, or at such temperatures nothing would be left of the loss
        want, want_dq, _ = official(q, k, queue, temperature)
        rows, dq, _ = fused(q, k, queue, temperature, precision)
        bound = torch.finfo(OPERAND[precision]).eps / temperature
        assert ((rows - want).abs() <= bound + 1e-5 + 2e-7 * want).all()
        assert relative(dq, want_dq) <= bound + 1e-5


@pytest.mark.parametrize("temperature", [0.05, 0.06, 0.07, 0.1, 0.2])
@pytest.mark.parametrize("cosine", [-0.2, -0.6, -0.95])
@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_queries_far_from_all_of_the_queue(backend, precision, cosine, temperature):
    """Under a fixed shift all their exponentials are small, and fp16 has few digits for small values."""
    q, k, queue = far(cosine, 5, 260, 64)
    want, want_dq, _ = official(q, k, queue, temperature)
    rows, dq, _ = fused(q, k, queue, temperature, precision)
    eps = torch.finfo(OPERAND[precision]).eps
    assert ((rows - want).abs() <= eps / temperature + 1e-5).all() and relative(dq, want_dq) <= eps + 2e-6


def test_small_losses_keep_their_digits_at_every_precision(backend):
    """The positive is computed in fp32, apart: rounding the negatives moves the loss by a share of itself."""
    for precision in checks.PRECISIONS:
        q, _, queue = make(20, 700, 64)
        want, want_dq, _ = official(q, q, queue, 0.04)
        rows, dq, _ = fused(q, q, queue, 0.04, precision)
        bound = torch.finfo(OPERAND[precision]).eps / 0.04
        assert ((rows - want).abs() <= (bound + 1e-4) * want).all()
        assert relative(dq, want_dq) <= bound + 1e-4


@pytest.mark.parametrize("return_stats", [True, False])
@pytest.mark.parametrize("need_dq", [True, False])
def test_every_output_is_written(backend, need_dq, return_stats):
    q, k, queue = make(9, 130, 40)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        outputs = _info_nce(q, k, queue, 0.07, "high", need_dq, return_stats)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in outputs)
    assert outputs[0].shape == (9,) and outputs[1].shape == (9 if need_dq else 0, 40)
    assert [value.shape[0] for value in outputs[2:]] == [9 if return_stats else 0] * 3
    assert (outputs[2] < 130).all()


@pytest.mark.parametrize("shape", [(5, 63, 32), (20, 130, 37), (70, 300, 128)], ids=str)
def test_triton_without_the_copy_engine(place, shape, monkeypatch):
    """What GPUs before Hopper run: pointers in place of descriptors, the same bits."""
    if place[0] != "triton":
        return  # the others have one path
    from moco_fast.kernels import info_nce as kernel

    q, k, queue = (tensor.to(place[1]) for tensor in make(*shape))
    with moco_fast.use_backend("triton"):
        want = fused(q, k, queue, 0.07, "high")
        monkeypatch.setattr(kernel, "has_tma", lambda device: False)
        monkeypatch.setattr(kernel, "OLDER_TILES", {})  # other tiles would add up in another order
        got = fused(q, k, queue, 0.07, "high")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_more_features_than_triton_holds(triton_device):
    q, k, queue = (tensor.to(triton_device) for tensor in make(2, 5, 513))
    with moco_fast.use_backend("triton"), pytest.raises(RuntimeError, match=r"up to 512 features.*got 513"):
        moco_fast.info_nce(q, k, queue)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_queue_of_one_key_of_any_stride(backend, precision):
    """A dimension of one element may have any stride; descriptors of memory take some only."""
    q, k, queue = make(5, 1, 32)
    single = torch.zeros(3, 131)
    single[0, :32] = queue[0]
    want = fused(q, k, queue, 0.2, precision)[:2]
    for view in (single[:1, :32], queue.t().contiguous().t()):
        assert torch.equal(view, queue)
        got = fused(q, k, view, 0.2, precision)[:2]
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_default_dtype_and_autocast_do_not_matter(backend, dtype, precision):
    q, k, queue = make(9, 300, 32)
    want = fused(q, k, queue, 0.07, precision=precision)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = fused(q, k, queue, 0.07, precision=precision)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_instruction_sets_and_threads(isa):
    """Every instruction set this CPU has, each with the same bits from any number of threads."""
    q, k, queue = make(70, 9001, 100)
    want, want_dq, _ = official(q, k, queue, 0.07)
    rows, dq = with_threads(lambda: fused(q, k, queue, 0.07)[:2])
    assert (rows - want).abs().max() < 5e-6 and relative(dq, want_dq) < 5e-6


def test_a_tie_ranks_below_the_positive(backend):
    q = torch.tensor([[2.0, 0.0, 0.0]])
    _, stats = moco_fast.info_nce(q, q, torch.eye(3), return_stats=True)
    assert stats.rank.tolist() == [0]


def test_second_derivative_raises_and_statistics_carry_no_gradient(backend):
    q, k, queue = make(5, 40, 8)
    q.requires_grad_()
    loss, stats = moco_fast.info_nce(q, k, queue, return_stats=True)
    assert not any(value.requires_grad for value in stats)
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.pow(2).sum().backward()


def test_gradcheck_in_float64():
    q, k, queue = make(4, 30, 6, torch.float64, queue_dtype=torch.float64)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: moco_fast.info_nce(q, k, queue, 0.3, reduction="none"), q)


def test_opcheck(backend):
    q, k, queue = make(5, 40, 8)
    arguments = (q.requires_grad_(), k, queue, 0.07, "high", True, True)
    torch.library.opcheck(_info_nce, arguments)
    torch.library.opcheck(_info_nce, (q.detach(), *arguments[1:5], False, False))


def test_compile_fullgraph(backend):
    q, k, queue = make(5, 40, 8)

    def step(q):
        return moco_fast.info_nce(q * 2, k, queue, 0.1)

    q.requires_grad_()
    (want,) = torch.autograd.grad(step(q), q)
    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(q), q)
    assert torch.allclose(got, want, rtol=1e-6)


def bad(**changes):
    q, k, queue = make(4, 10, 8)
    return {"q": q, "k": k, "queue": queue, "temperature": 0.07} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "q must have a floating-point dtype.*int64"),
        ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"q": torch.zeros(8)}, ValueError, r"q must have 2 dimensions.*\(8,\)"),
        ({"q": torch.zeros(0, 8), "k": torch.zeros(0, 8)}, ValueError, r"at least one row.*\(0, 8\)"),
        ({"k": torch.zeros(3, 8)}, ValueError, r"k must have the shape of q, \(4, 8\), got \(3, 8\)"),
        ({"k": torch.zeros(4, 8).half()}, TypeError, "k must have the dtype of q.*float16"),
        ({"k": torch.zeros(4, 8, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
        ({"k": torch.zeros(4, 8, requires_grad=True)}, ValueError, "k requires grad.*detach"),
        (
            {"queue": torch.zeros(8, 10)},
            ValueError,
            r"queue must have shape \(K, 8\).*\(8, 10\): pass queue.t\(\)",
        ),
        ({"queue": torch.zeros(0, 8)}, ValueError, "queue must hold at least one row"),
        ({"queue": torch.zeros(10, 8, requires_grad=True)}, ValueError, "queue requires grad"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": 1e-40}, ValueError, "above 0, got 1e-40 whose reciprocal overflows fp32"),
        ({"temperature": -1.0}, ValueError, "temperature.*-1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature.*nan"),
        ({"temperature": "warm"}, TypeError, "temperature must be a number, got str 'warm'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'highest'.*got 'fp8'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean'.*got 'max'"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        moco_fast.info_nce(**bad(**changes))
