"""split_batch_norm: every backend, layout and dtype against torch's batch norm of each part in float64."""

import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import with_threads
from torch import nn
from torch.nn import functional as F

import moco_fast
from moco_fast import native, norm, reference
from moco_fast.backends import use_backend
from moco_fast.ops import batch_norm

OP = "split_batch_norm"

# (shape, parts): a value of a vector, tiles that are not full, runs of one and of more than a tile.
SHAPES = [
    ((4, 1, 2, 1), 2),
    ((8, 5, 3, 3), 4),
    ((10, 70), 5),
    ((600, 3), 2),
    ((3, 11, 7, 7), 3),
    ((6, 13, 5, 9), 3),
    ((2, 3, 37, 41), 2),
    ((6, 7, 21), 1),
    ((4, 10, 2, 3, 5), 2),
    ((26, 9, 16, 2), 2),
]
KINDS = [  # dtypes of x and of the weights
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "gaps": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0],
}


def by_parts(x, weight, bias, splits, eps=1e-5):
    """What one device does that stands for several: torch's batch norm of every part."""
    return torch.cat([F.batch_norm(p, None, None, weight, bias, True, eps=eps) for p in x.chunk(splits)])


def make(shape, kind=KINDS[0], layout="contiguous", shift=0.5):
    """x, weight, bias and the gradient to y, on the default device."""
    x = LAYOUTS[layout]((torch.randn(shape) * 2 + shift).to(kind[0])).requires_grad_()
    weight, bias = (torch.randn(shape[1]).to(kind[1]).requires_grad_() for _ in range(2))
    return x, weight, bias, torch.randn(shape).to(kind[0])


def results(op, x, weight, bias, dy):
    """y and the gradients to x, weight and bias."""
    y = op(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


def fused(splits, eps=1e-5):
    return lambda x, weight, bias: moco_fast.split_batch_norm(x, weight, bias, splits, eps)[0]


def eager(splits, eps=1e-5):
    return lambda x, weight, bias: by_parts(x, weight, bias, splits, eps)


def exactly(op, x, weight, bias, dy):
    return results(op, *(t.detach().double().requires_grad_() for t in (x, weight, bias)), dy.double())


def assert_as_exact_as_eager(got, other, want, half_ulp=lambda dtype: 0):
    """Twice eager's error in the same dtype, a little for sums in fp32, and one rounding of the result."""
    for name, a, b, c in zip(("y", "dx", "dweight", "dbias"), got, other, want, strict=True):
        assert a.dtype == b.dtype and a.shape == c.shape and torch.isfinite(a).all(), name
        limit = 2 * (b.double() - c).abs().max() + (2e-6 + half_ulp(a.dtype)) * c.abs().max()
        assert (a.double() - c).abs().max() <= limit, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "splits"), SHAPES, ids=str)
def test_against_float64(backend, half_ulp, shape, splits, kind, layout):
    inputs = make(shape, kind, layout)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        got = results(fused(splits), *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    other, want = results(eager(splits), *inputs), exactly(eager(splits), *inputs)
    assert_as_exact_as_eager(got, other, want, half_ulp)
    for result in got[:2]:  # nobody downstream has to change the layout back
        assert layout == "gaps" or result.stride() == inputs[0].stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_statistics(backend, kind, layout):
    x, weight, bias, _ = make((12, 17, 5, 6), kind, layout)
    _, mean, var = moco_fast.split_batch_norm(x, weight, bias, 3)
    parts = x.detach().double().unflatten(0, (3, 4)).transpose(1, 2).flatten(2)
    for got, want in ((mean, parts.mean(2)), (var, parts.var(2, correction=0))):
        assert got.dtype == torch.float32 and got.shape == (3, 17) and not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_large_means_and_outliers(backend, layout):
    """Where squares less the square of the mean have no digits left."""
    x, weight, bias, dy = make((40, 5, 6, 7), layout=layout, shift=1e3)
    inputs = x, weight, bias, dy
    assert_as_exact_as_eager(
        results(fused(2), *inputs), results(eager(2), *inputs), exactly(eager(2), *inputs)
    )
    with torch.no_grad():
        x.sub_(1e3)
        x[::20, :, 0, 0] = 1e4  # the first value of every part and channel
    _, mean, var = moco_fast.split_batch_norm(x, weight, bias, 2)
    parts = x.detach().double().unflatten(0, (2, 20)).transpose(1, 2).flatten(2)
    want = parts.var(2, correction=0)
    assert ((mean - parts.mean(2)).abs() <= 3e-6 * want.sqrt()).all()
    assert ((var - want).abs() <= 3e-6 * want).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_constant_channels(backend, layout):
    x, weight, bias, dy = make((6, 4, 3, 3), layout=layout)
    with torch.no_grad():
        x[:, 1] = 3.25
    y, dx, _, _ = results(fused(2), x, weight, bias, dy)
    assert torch.equal(y[:, 1], bias.detach()[1].expand(6, 3, 3)) and torch.isfinite(dx).all()
    _, _, var = moco_fast.split_batch_norm(x, weight, bias, 2)
    assert (var[:, 1] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_bf16_ties_go_to_even(backend, layout):
    x = LAYOUTS[layout](torch.randn(4, 16, 4, 4).bfloat16())
    y, _, _ = moco_fast.split_batch_norm(x, torch.zeros(16), torch.full((16,), 1 + 2**-8), 2)
    assert (y == 1).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("has", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias(backend, has, layout):
    x, weight, bias, dy = make((6, 9, 4, 4), layout=layout)
    given = [value if there else None for value, there in zip((weight, bias), has, strict=True)]
    inputs = [x, *(value for value in given if value is not None)]
    got, want = (torch.autograd.grad(op(3)(x, *given), inputs, dy) for op in (fused, eager))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gradients_of_any_strides(backend, layout):
    """A sum's gradient is one value, expanded; a permuted one lies in the other order."""
    x, weight, bias, dy = make((6, 3, 4, 5), layout=layout)
    want = results(fused(3), x, weight, bias, dy)
    for other in LAYOUTS.values():
        for a, b in zip(results(fused(3), x, weight, bias, other(dy)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(moco_fast.split_batch_norm(x, weight, bias, 3)[0].sum(), x)
    assert dx.abs().max() < 1e-5  # y has the sum of bias, whatever x


def test_weight_and_bias_of_any_stride(backend):
    x, weight, bias, dy = make((6, 3, 4, 5))
    want = results(fused(3), x, weight, bias, dy)
    apart = [torch.stack([t, t + 1], dim=1).detach()[:, 0].requires_grad_() for t in (weight, bias)]
    got = results(fused(3), x, *apart, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=str)
def test_non_finite_values_stay_in_their_part_and_channel(backend, kind, layout, value):
    x, weight, bias, _ = make((6, 5, 4, 5), kind, layout)
    with torch.no_grad():
        x[3, 4, 1, 2] = value  # in the second part
    y, _, _ = moco_fast.split_batch_norm(x, weight, bias, 3)
    bad = torch.zeros(3, 2, 5, 4, 5, dtype=torch.bool)
    bad[1, :, 4] = True
    assert torch.equal(~torch.isfinite(y), bad.flatten(0, 1))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_repeats_bitwise(backend, layout):
    inputs = make((24, 6, 5, 5), layout=layout)
    first, second = (results(fused(4), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_instruction_sets_and_threads(isa, kind, layout):
    """Every instruction set this CPU has, each with the same bits from any number of threads."""
    inputs = make((32, 75, 9, 9), kind, layout)  # enough values for several threads
    other, want = results(eager(4), *inputs), exactly(eager(4), *inputs)
    assert_as_exact_as_eager(with_threads(lambda: results(fused(4), *inputs)), other, want)


@pytest.mark.parametrize("tiles", [(32, 8, 1, 8), (64, 16, 2, 50)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_triton_tiles(place, layout, tiles):
    """Several blocks of columns, shares and steps of each."""
    if place[0] != "triton":
        return  # the others have no tiles to choose
    from moco_fast.kernels import split_batch_norm as kernel

    x, weight, bias, dy = (t.detach().to(place[1]) for t in make((12, 9, 2, 9), layout=layout))
    cut = kernel.plan(x, 2, tiles)
    assert cut.sizes["shares"] > 1 and cut.grid[0] > (tiles[1] == 8)
    y, mean, var = kernel.split_batch_norm(x, weight, bias, 2, 1e-5, tiles)
    got = y, *kernel.split_batch_norm_backward(dy, x, weight, mean, var, 1e-5, tiles)
    inputs = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy
    assert_as_exact_as_eager(got, results(eager(2), *inputs), exactly(eager(2), *inputs))


def test_float64_and_its_gradients():
    x, weight, bias, _ = (t.detach().double().requires_grad_() for t in make((6, 3, 2, 2)))
    assert torch.autograd.gradcheck(fused(3), (x, weight, bias))
    _, mean, _ = moco_fast.split_batch_norm(x, weight, bias, 3)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(fused(3)(x, weight, bias), by_parts(x, weight, bias, 3))


def test_second_derivative_raises(backend):
    x, weight, bias, _ = make((6, 3, 2, 2))
    y, _, _ = moco_fast.split_batch_norm(x, weight, bias, 3)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(backend, layout):
    x, weight, bias, dy = make((4, 3, 2, 3), layout=layout)
    torch.library.opcheck(batch_norm._split_batch_norm, (x, weight, bias, 2, 1e-5))
    torch.library.opcheck(batch_norm._split_batch_norm, (x, None, None, 2, 1e-5))
    _, mean, var = moco_fast.split_batch_norm(x, weight, bias, 2)
    given = (dy, x.detach(), weight.detach(), mean, var, 1e-5, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(batch_norm._split_batch_norm_backward, given, test_utils=checks)
    got = results(torch.compile(fused(2), fullgraph=True), x, weight, bias, dy)
    for a, b in zip(got, results(fused(2), x, weight, bias, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [("reference", None), (None, "reference")])
def test_backward_takes_the_backend_of_its_forward(monkeypatch, before, after):
    """Which runs after the block that forced it; on a GPU also in another thread, as here."""
    if native.unavailable():
        pytest.skip("the other backend is not built")
    served = []

    def watched(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: served.append(module) or function(*args))

    for module in (native, reference):
        for name in ("split_batch_norm", "split_batch_norm_backward"):
            watched(module, name)
    x, weight, bias, dy = make((6, 3, 2, 2))
    with use_backend(before) if before else nullcontext():
        y = fused(2)(x, weight, bias)

    def backward():
        with use_backend(after) if after else nullcontext():
            y.backward(dy)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert served == [reference if before else native] * 2 and x.grad is not None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_follows_torch(backend, momentum):
    """Outputs, gradients and buffers of the loop over parts with torch's modules; nothing is read back."""
    split = moco_fast.SplitBatchNorm(7, 3, momentum=momentum)
    devices = [nn.BatchNorm2d(7, momentum=momentum) for _ in range(3)]
    for _ in range(3):
        x = torch.randn(12, 7, 4, 4) * 3 + 1
        dy = torch.randn(x.shape)
        got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = split(got)
        parts = torch.cat([device(part) for device, part in zip(devices, want.chunk(3), strict=True)])
        torch.testing.assert_close(y, parts)
        y.backward(dy)
        parts.backward(dy)
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(device, name) for device in devices]).mean(0)
            torch.testing.assert_close(getattr(split, name), mean)
            for device in devices:  # as SplitBatchNorm does, all parts go on from the mean
                setattr(device, name, mean.clone())
    assert split.num_batches_tracked.item() == 3
    assert list(split.state_dict()) == list(devices[0].state_dict())


def test_module_does_not_wait_for_the_device():
    """On meta tensors any value that is read back raises."""
    for momentum in (0.1, None):
        split = moco_fast.SplitBatchNorm(7, 3, momentum=momentum).to("meta")
        with moco_fast.use_backend("reference"):
            assert split(torch.empty(6, 7, 2, 2, device="meta")).shape == (6, 7, 2, 2)


def test_module_compiles(backend):
    split, x = moco_fast.SplitBatchNorm(7, 3), torch.randn(6, 7, 4, 4)
    other = moco_fast.SplitBatchNorm(7, 3)
    torch.testing.assert_close(torch.compile(other, fullgraph=True)(x), split(x))
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffer, split.get_buffer(name))


def test_module_under_autocast_and_in_bf16(backend, device):
    """As torch: y has the dtype of x; a module in bf16 keeps its statistics in bf16."""
    split, plain = moco_fast.SplitBatchNorm(7, 2), nn.BatchNorm2d(7)
    x = torch.randn(6, 7, 4, 4)
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert split(x.to(dtype)).dtype == plain(x.to(dtype)).dtype == dtype
    split.bfloat16()(x.bfloat16()).sum().backward()
    assert split.running_mean.dtype == split.weight.grad.dtype == torch.bfloat16


def test_module_without_running_statistics(backend):
    split = norm.split_batchnorm(nn.BatchNorm1d(5, track_running_stats=False), 2)
    x = torch.randn(8, 5, 3)
    torch.testing.assert_close(split(x), by_parts(x, split.weight, split.bias, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(6, 3, dtype=torch.int8)}, TypeError, "x must have a floating-point dtype"),
        (
            {"x": torch.ones(6)},
            ValueError,
            r"x must have at least 2 dimensions \(N, C, ...\), got shape \(6,\)",
        ),
        ({"x": torch.ones(6, 0)}, ValueError, r"x must have at least one channel, got shape \(6, 0\)"),
        ({"splits": 0}, ValueError, "splits must be at least 1, got 0"),
        ({"splits": 2.0}, TypeError, "splits must be an integer, got float 2.0"),
        ({"splits": 4}, ValueError, "splits=4 must divide the batch, got 6 samples"),
        (
            {"splits": 6},
            ValueError,
            r"Expected more than 1 value per channel.*splits=6.*got x of shape \(6, 3\)",
        ),
        ({"x": torch.ones(0, 3)}, ValueError, "Expected more than 1 value per channel"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0, got -1e-05"),
        ({"eps": "1e-5"}, TypeError, "eps must be a number, got str '1e-5'"),
        (
            {"weight": torch.ones(4)},
            ValueError,
            r"weight must have shape \(3,\) to match x \(6, 3\), got \(4,\)",
        ),
        ({"weight": torch.ones(1, 3)}, ValueError, r"weight must have 1 dimensions, got shape \(1, 3\)"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor, got float"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be torch.float32 or.*got torch.float16"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(3,\)"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias is on meta, but x is on cpu"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"x": torch.ones(6, 3), "weight": torch.ones(3), "bias": torch.ones(3), "splits": 2} | changes
    with pytest.raises(error, match=message):
        moco_fast.split_batch_norm(**arguments)


def test_bad_batches_leave_the_module_alone():
    split = moco_fast.SplitBatchNorm(3, 2)
    before = {name: buffer.clone() for name, buffer in split.named_buffers()}
    for x in (torch.ones(5, 3), torch.ones(2, 3), torch.ones(4, 4)):
        with pytest.raises(ValueError):
            split(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in split.named_buffers())
