"""dino: every backend x dtype x odd shape against autograd of the formula in float64."""

import pytest
import torch
from conftest import with_threads
from largest import Largest
from torch.nn import functional as F

import moco_fast
from moco_fast import checks, reference
from moco_fast.ops.distillation import _dino
from moco_fast.reference.distillation import BLOCK_LOGITS

OP = "dino"
SHAPES = [(1, 257, 32), (5, 1000, 64), (37, 257, 256), (130, 70, 33), (3, 1, 40)]  # N, P, C
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [((37, 130, 64), torch.bfloat16), ((5, 257, 100), torch.float16)]
SCALE = 4096.0  # of the loss, as GradScaler does: fp16 gradients would be subnormal without it
TEMPERATURES = (0.1, 0.04)


def make(n, p, c, dtype=torch.float32, clustered=False):
    """Student and teacher of norms far from 1, prototypes of about unit norm, and a center."""
    centres = F.normalize(torch.randn(4, c, dtype=torch.float64), dim=1)

    def draw(rows):
        noise = torch.randn(rows, c, dtype=torch.float64) / c**0.5
        return centres[torch.randint(4, (rows,))] + 0.2 * noise if clustered else noise

    student = draw(n)
    teacher, prototypes = 0.5 * student + 0.5 * draw(n), draw(p)
    teacher_prototypes = prototypes + 0.1 * draw(p)
    features = (x.to(dtype) for x in (student * 30, teacher * 0.1, prototypes, teacher_prototypes))
    return *features, 0.1 * torch.randn(p)


def formula(student, teacher, prototypes, teacher_prototypes, center, temperatures, dtype=torch.float64):
    """Loss rows, and gradients to student and prototypes of SCALE times their mean, from the logits."""
    student, prototypes = (x.detach().to(dtype).requires_grad_() for x in (student, prototypes))
    t = F.normalize(teacher.to(dtype), dim=1) @ teacher_prototypes.to(dtype).t() - center.to(dtype)
    s = F.normalize(student, dim=1) @ prototypes.t()
    rows = -(F.softmax(t / temperatures[1], dim=1) * F.log_softmax(s / temperatures[0], dim=1)).sum(dim=1)
    return rows.detach(), *torch.autograd.grad(rows.mean() * SCALE, (student, prototypes))


def fused(student, teacher, prototypes, *others, temperatures=TEMPERATURES, precision="highest"):
    """The same from the op below dino(), which has both the loss rows and the gradients."""
    student, prototypes = (x.clone().requires_grad_() for x in (student, prototypes))
    rows, *_ = _dino(student, teacher, prototypes, *others, *temperatures, precision, True, True)
    ds, dw = torch.autograd.grad(rows.mean() * SCALE, (student, prototypes))
    assert rows.dtype == torch.float32 and ds.dtype == student.dtype and dw.dtype == prototypes.dtype
    return rows.detach(), ds, dw


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_error_at_most_twice_eager(backend, shape, dtype, clustered):
    inputs = make(*shape, dtype, clustered)
    want, *gradients = formula(*inputs, TEMPERATURES)
    eager, *eager_gradients = formula(*inputs, TEMPERATURES, torch.float32)
    rows, *found = fused(*inputs)
    # 1e-5: one rounding of a teacher's logit, 1e-6 at 25, times the spread of the student's, is more.
    assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 1e-5
    rounding = torch.finfo(dtype).eps / 2  # gradients are handed out in the dtype of what they are to
    for got, exact, from_eager in zip(found, gradients, eager_gradients, strict=True):
        error, eager_error = (got - exact).norm(), (from_eager - exact).norm()
        # 1e-9: with one prototype there is no loss, and no gradient
        assert error <= 2 * eager_error + (2e-6 + rounding) * exact.norm() + 1e-9


# What a precision may round the operands of matrix products to; the reference stays in fp32 for all.
OPERAND = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@pytest.mark.parametrize(
    ("precision", "temperatures"),
    [(p, (0.1, 0.04)) for p in checks.PRECISIONS] + [("high", t) for t in ((10.0, 10.0), (0.02, 0.005))],
    ids=str,
)
def test_precisions_and_temperatures(backend, precision, temperatures):
    """Two rounded operands move a cosine by at most eps, which T divides; rounded weights add another eps."""
    inputs = make(20, 70, 40, clustered=True)
    want, *gradients = formula(*inputs, temperatures)
    eager, *_ = formula(*inputs, temperatures, torch.float32)
    rows, *found = fused(*inputs, temperatures=temperatures, precision=precision)
    # Teacher's weights that are off by a share move the mean of the student's logits by it times 2 / T_s.
    eps = torch.finfo(OPERAND[precision]).eps
    share = eps * (1 + 1 / temperatures[1])
    assert (rows - want).abs().max() <= (
        2 * share / temperatures[0] + eps / temperatures[0] + 1e-5 + 2 * (eager - want).abs().max()
    )
    for got, exact in zip(found, gradients, strict=True):
        assert relative(got, exact) <= 4 * (share + eps / temperatures[0]) + 1e-5


def test_any_center_and_any_norm_of_prototypes(backend):
    """Logits of thousands: only under a running maximum do their exponentials stay finite."""
    student, teacher, prototypes, teacher_prototypes, _ = make(7, 300, 32)
    inputs = student, teacher, 30 * prototypes, 30 * teacher_prototypes, 100 * torch.randn(300)
    want, *gradients = formula(*inputs, TEMPERATURES)
    eager, *eager_gradients = formula(*inputs, TEMPERATURES, torch.float32)
    rows, *found = fused(*inputs)
    assert (rows - want).abs().max() <= 2 * (eager - want).abs().max() + 2e-6 * want.abs().max()
    for got, exact, from_eager in zip(found, gradients, eager_gradients, strict=True):
        assert relative(got, exact) <= 2 * relative(from_eager, exact) + 2e-5


@pytest.mark.parametrize("shape", [(130, 96, 17), (33, 200, 200), (40, 1000, 64)], ids=str)
def test_logits_with_much_in_common(backend, shape):
    """Rows and long prototypes near one direction: the loss is far smaller than the logits."""
    direction = F.normalize(torch.randn(shape[2]), dim=0)
    student, teacher, prototypes, teacher_prototypes, center = make(*shape)
    rows = (direction + 0.01 * student, direction + 0.1 * teacher)
    inputs = *rows, 10 * direction + prototypes, 10 * direction + teacher_prototypes, center
    want, *_ = formula(*inputs, TEMPERATURES)
    eager, *_ = formula(*inputs, TEMPERATURES, torch.float32)
    found, *_ = fused(*inputs)
    exact = 2e-4 if backend == "triton" else 1e-5  # 2e-4: of pairs of fp16, 22 bits of logits of 10 / T_s
    assert (found - want).abs().max() <= 2 * (eager - want).abs().max() + exact


MASKS = pytest.mark.parametrize("which", [slice(0, 96), slice(100, None), slice(3, 4)], ids=str)


def assert_masked_are_ignored(which):
    """Loss and gradients know nothing of the prototypes whose center is infinite."""
    student, teacher, prototypes, teacher_prototypes, _ = make(5, 300, 16)
    center = torch.zeros(300)
    center[which] = torch.inf
    inputs = student, teacher, prototypes, teacher_prototypes, center
    want = formula(*inputs, TEMPERATURES)
    assert all(relative(*pair) < 1e-5 for pair in zip(fused(*inputs), want, strict=True))


@MASKS
@pytest.mark.parametrize("block", [2**18, 64 * 5], ids=["whole", "blocks"])
def test_masked_prototypes_of_the_reference(monkeypatch, which, block):
    monkeypatch.setattr("moco_fast.reference.distillation.BLOCK_LOGITS", block)
    with moco_fast.use_backend("reference"):
        assert_masked_are_ignored(which)


@MASKS
def test_masked_prototypes_of_the_kernels(isa, which):
    assert_masked_are_ignored(which)


@MASKS
def test_masked_prototypes(backend, which):
    """Of Triton's kernels whole tiles, the first of a share among them."""
    assert_masked_are_ignored(which)


@pytest.mark.parametrize("rows", [1, 31, 32, 70])
def test_rows_that_fill_up_a_panel_reach_no_gradient(isa, rows):
    """Their scores are 0 * inf, of a teacher's prototype that has no weight for the others."""
    inputs = make(rows, 300, 16)
    inputs[1].abs_()
    inputs[3][3] = -torch.inf
    assert all(torch.isfinite(x).all() for x in fused(*inputs))


@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_widest_rows(backend, precision):
    """Of 512 features: tiles of their own, or none for pairs of operands."""
    inputs = make(5, 40, 500)
    want, *gradients = formula(*inputs, (0.5, 0.5))
    rows, *found = fused(*inputs, temperatures=(0.5, 0.5), precision=precision)
    bound = 8 * torch.finfo(OPERAND[precision]).eps + 1e-5
    assert (rows - want).abs().max() <= bound
    assert all(relative(got, exact) <= 2 * bound for got, exact in zip(found, gradients, strict=True))


def test_zero_rows_follow_normalize(backend):
    inputs = make(4, 40, 32)
    inputs[0][1] = inputs[1][2] = 0
    want, ds, dw = formula(*inputs, (0.5, 0.5))
    rows, *found = fused(*inputs, temperatures=(0.5, 0.5))
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    # 1e12 times the gradient to a unit row, as F.normalize gives
    assert relative(found[0][1], ds[1]) < 1e-5 and relative(found[0][2:], ds[2:]) < 1e-5
    assert relative(found[1], dw) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_non_finite_rows_give_non_finite_losses(backend, value, which):
    inputs = make(5, 40, 32)
    inputs[which][1, 3] = value
    rows, ds, _ = fused(*inputs)
    assert torch.isfinite(rows).tolist() == [i != 1 for i in range(5)]
    assert torch.isfinite(ds[2:]).all() and not torch.isfinite(ds[1]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gradients", [True, False])
def test_non_finite_prototypes_give_non_finite_losses(backend, value, gradients):
    inputs = make(5, 40, 32)
    inputs[2][39, 3] = value
    rows, *_ = _dino(*inputs, *TEMPERATURES, "highest", gradients, gradients)
    assert not torch.isfinite(rows).any()


def test_non_contiguous_views(backend):
    inputs = make(6, 70, 33)
    want = fused(*inputs)
    views = []
    for x in inputs:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        views.append(wide[..., ::2])
    assert not any(view.is_contiguous() for view in views)
    got = fused(*views)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-3) for a, b in zip(got, want, strict=True))


def test_bitwise_repeatable(backend):
    inputs = make(20, 200, 40)  # several shares of the prototypes
    first, again = fused(*inputs), fused(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_instruction_sets_and_threads(isa):
    """Every instruction set this CPU has, each with the same bits from any number of threads."""
    inputs = make(150, 7001, 100)  # several tiles in a run, and groups of panels
    want = formula(*inputs, TEMPERATURES)
    got = with_threads(lambda: fused(*inputs))
    assert all(relative(*pair) < 1e-5 for pair in zip(got, want, strict=True))


def test_dtypes_of_prototypes_are_free(backend):
    """A student under autocast, prototypes in fp32; and the other way round."""
    student, teacher, *others = make(6, 40, 32)
    mixed = student.bfloat16(), teacher.bfloat16(), *others
    want, *gradients = formula(*mixed, TEMPERATURES)
    rows, *found = fused(*mixed)
    assert torch.allclose(rows.double(), want, rtol=1e-5)
    assert all(relative(got, exact) < 4e-3 for got, exact in zip(found, gradients, strict=True))
    mixed = student, teacher, others[0].half(), others[1].bfloat16(), others[2]
    rows, *_ = fused(*mixed)
    assert torch.allclose(rows.double(), formula(*mixed, TEMPERATURES)[0], rtol=1e-5)


@pytest.mark.parametrize(("need_ds", "need_dw"), [(True, True), (True, False), (False, True), (False, False)])
def test_every_output_is_written(backend, need_ds, need_dw):
    inputs = make(9, 70, 40)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        rows, ds, dw = _dino(*inputs, *TEMPERATURES, "highest", need_ds, need_dw)
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.shape == (9,)
    assert ds.shape == (9 if need_ds else 0, 40) and dw.shape == (70 if need_dw else 0, 40)
    assert all(torch.isfinite(x).all() for x in (rows, ds, dw))


def test_reductions_frozen_prototypes_and_weighted_rows(backend):
    inputs = make(6, 40, 32)
    want_rows, want_ds, want_dw = formula(*inputs, TEMPERATURES)
    student, prototypes = inputs[0].requires_grad_(), inputs[2]
    rows = moco_fast.dino(*inputs, precision="highest", reduction="none")
    assert torch.allclose(rows.double(), want_rows, rtol=1e-5)
    weights = torch.rand(6)
    (weighted,) = torch.autograd.grad((rows * weights).sum(), student)
    assert relative(weighted, want_ds * weights[:, None] * 6 / SCALE) < 1e-5

    student.requires_grad_(False), prototypes.requires_grad_()
    loss = moco_fast.dino(*inputs, precision="highest", reduction="sum")
    assert torch.allclose(loss.double(), want_rows.sum(), rtol=1e-5)
    (dw,) = torch.autograd.grad(loss * SCALE, prototypes)
    assert relative(dw, want_dw * 6) < 1e-5


def test_autocast_does_not_matter(backend):
    inputs = make(9, 40, 32)
    want = fused(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("of", [0, 2], ids=["student", "prototypes"])
def test_second_derivative_raises(backend, of):
    inputs = make(5, 40, 32)
    x = inputs[of].requires_grad_()
    (grad,) = torch.autograd.grad(moco_fast.dino(*inputs), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.pow(2).sum().backward()


def test_gradcheck_in_float64():
    inputs = [x.double() for x in make(4, 70, 5, torch.float64)]
    student, teacher, prototypes, *others = inputs

    def loss(student, prototypes, reduction="mean"):
        return moco_fast.dino(student, teacher, prototypes, *others, 0.3, 0.2, reduction=reduction)

    student.requires_grad_(), prototypes.requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, prototypes))
    assert torch.autograd.gradcheck(lambda s: loss(s, prototypes.detach(), "none"), student)


def test_opcheck(backend):
    inputs = make(5, 40, 32)
    torch.library.opcheck(_dino, (*inputs, *TEMPERATURES, "high", False, False))
    inputs[0].requires_grad_(), inputs[2].requires_grad_()
    torch.library.opcheck(_dino, (*inputs, *TEMPERATURES, "high", True, True))


def test_compile_fullgraph(backend):
    student, teacher, prototypes, *others = make(5, 40, 32)
    student.requires_grad_(), prototypes.requires_grad_()

    def step(student, prototypes):
        return moco_fast.dino(student * 2, teacher, prototypes * 3, *others)

    want = torch.autograd.grad(step(student, prototypes), (student, prototypes))
    compiled = torch.compile(step, fullgraph=True)
    got = torch.autograd.grad(compiled(student, prototypes), (student, prototypes))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, want, strict=True))


def test_logits_are_never_all_there():
    """The reference: nothing larger than a block of logits, or than the prototypes and their gradient."""
    n, p, c = 200, 20_000, 8
    inputs = make(n, p, c)
    assert n * p > 8 * max(BLOCK_LOGITS, p * c)
    with Largest() as largest:
        reference.dino(*inputs, *TEMPERATURES, "highest", True, True)
    assert n * c < largest.elements <= max(BLOCK_LOGITS, p * c)


def bad(**changes):
    names = ("student", "teacher", "prototypes", "teacher_prototypes", "center")
    return dict(zip(names, make(4, 70, 8), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": torch.zeros(4, 8).int()}, TypeError, "student must have a floating-point.*int32"),
        ({"teacher": [[1.0]]}, TypeError, "teacher must be a torch.Tensor, got list"),
        ({"student": torch.zeros(2, 4, 8)}, ValueError, r"student must have 2 dimensions.*\(2, 4, 8\)"),
        ({"student": torch.zeros(0, 8)}, ValueError, r"student must hold at least one row.*\(0, 8\)"),
        ({"teacher": torch.zeros(5, 8)}, ValueError, r"teacher must have the shape of student.*\(5, 8\)"),
        ({"teacher": torch.zeros(4, 8).half()}, TypeError, "teacher must have the dtype of student.*float16"),
        (
            {"prototypes": torch.zeros(70, 9)},
            ValueError,
            r"prototypes must have shape \(P, 8\).*\(4, 8\), got \(70, 9\)",
        ),
        ({"prototypes": torch.zeros(0, 8)}, ValueError, r"prototypes must have shape \(P, 8\).*got \(0, 8\)"),
        (
            {"teacher_prototypes": torch.zeros(71, 8)},
            ValueError,
            r"teacher_prototypes must have the shape of prototypes, \(70, 8\), got \(71, 8\)",
        ),
        ({"center": torch.zeros(1, 70)}, ValueError, r"center must have 1 dimensions.*\(1, 70\)"),
        ({"center": torch.zeros(71)}, ValueError, r"center must have shape \(70,\).*got \(71,\)"),
        ({"center": torch.zeros(70).half()}, TypeError, r"center must be torch.float32 or.*float16"),
        (
            {"center": torch.zeros(70, device="meta")},
            ValueError,
            "center is on meta, but student is on cpu",
        ),
        (
            {"teacher": torch.zeros(4, 8, requires_grad=True)},
            ValueError,
            r"teacher requires grad.*teacher.detach\(\)",
        ),
        (
            {"teacher_prototypes": torch.zeros(70, 8, requires_grad=True)},
            ValueError,
            "teacher_prototypes requires grad",
        ),
        ({"center": torch.zeros(70, requires_grad=True)}, ValueError, "center requires grad"),
        (
            {"student_temperature": 0},
            ValueError,
            "student_temperature must be finite and above 0, got 0",
        ),
        ({"teacher_temperature": float("nan")}, ValueError, "teacher_temperature.*nan"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'highest'.*got 'fp8'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean'.*got 'max'"),
        (
            {"prototypes": torch.zeros(70, 8, requires_grad=True), "reduction": "none"},
            ValueError,
            "reduction must be 'mean' or 'sum' where a gradient is wanted, got 'none'",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        moco_fast.dino(**bad(**changes))
