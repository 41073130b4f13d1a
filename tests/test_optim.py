"""SGD, AdamW and LARS with the EMA in their step: against torch.optim and float64, any dtype and layout."""

import pytest
import torch
from optimizers import close, give_gradients, keys_of, make, parameters

from moco_fast.native import multi_tensor
from moco_fast.optim import LARS, SGD, AdamW

OP = "sgd_"  # of the backends that the fixtures ask; adamw_ has the same
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["one pass", "by lists"])
def reads_tensors(request, monkeypatch):
    """Both ways from tensors to addresses: torch >= 2.10 has the first, older ones only the second."""
    monkeypatch.setattr(multi_tensor, "_READS_TENSORS", request.param and multi_tensor._READS_TENSORS)


SGD_OPTIONS = [
    {},
    {"momentum": 0.9, "weight_decay": 1e-2},
    {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 1e-2},
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_is_torchs_bit_for_bit(backend, reads_tensors, device, options):
    """In fp32, keys included, with a parameter that is without a gradient at times."""
    ours, theirs = parameters(device), parameters(device)
    keys = keys_of(ours)
    want_keys = [key.clone() for key in keys]
    fused = SGD(ours, 0.1, **options, ema=zip(keys, ours, strict=True), m=0.99)
    plain = torch.optim.SGD(theirs, 0.1, **options, foreach=True)
    for step in range(4):
        for params in (ours, theirs):
            give_gradients(params, step, skip=3 if step in (0, 2) else None)
        fused.step()
        plain.step()
        want_keys = [k * 0.99 + p.detach() * (1 - 0.99) for k, p in zip(want_keys, theirs, strict=True)]
        for got, want in zip([*ours, *keys], [*theirs, *want_keys], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "betas": (0.4, 0.9), "maximize": True}], ids=str
)
def test_adamw_is_torchs(backend, reads_tensors, device, options):
    ours, theirs = parameters(device), parameters(device)
    keys = keys_of(ours)
    want_keys = [key.double() for key in keys]
    fused = AdamW(ours, 1e-2, **options, ema=zip(keys, ours, strict=True), m=0.9)
    plain = torch.optim.AdamW(theirs, 1e-2, **options, foreach=True)
    for step in range(4):
        for params in (ours, theirs):
            give_gradients(params, step, skip=3 if step == 1 else None)
        fused.step()
        plain.step()
        want_keys = [k * 0.9 + p.detach().double() * 0.1 for k, p in zip(want_keys, theirs, strict=True)]
        for got, want in zip([*ours, *keys], [*theirs, *want_keys], strict=True):
            close(got, want, torch.float32)
    assert fused.state[ours[3]]["step"] == 3 and fused.state[ours[4]]["step"] == 4


def lars_oracle(params, grads, state, lr, weight_decay, momentum, trust):
    """The formula in float64, tensor by tensor."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        d = g.double()
        if p.ndim > 1:
            d = d + weight_decay * p
            sizes = p.norm(), d.norm()
            d = d * (trust * sizes[0] / sizes[1] if min(sizes) > 0 else 1.0)
        state[i] = momentum * state[i] + d
        params[i] = p - lr * state[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lars_follows_its_formula(backend, reads_tensors, device, dtype):
    params = parameters(device, dtype)
    with torch.no_grad():
        params[4].zero_()  # a norm of zero: no scaling
    keys = keys_of(params)
    want = [param.detach().double().clone() for param in params]
    want_keys, state = [key.double().clone() for key in keys], [torch.zeros_like(p) for p in want]
    optimizer = LARS(params, 0.5, 0.1, ema=zip(keys, params, strict=True), m=0.9)
    for step in range(3):
        give_gradients(params, step)
        lars_oracle(want, [param.grad for param in params], state, 0.5, 0.1, 0.9, 0.001)
        optimizer.step()
        want_keys = [k * 0.9 + p * 0.1 for k, p in zip(want_keys, want, strict=True)]
    for got, expected in zip([*params, *keys], [*want, *want_keys], strict=True):
        close(got, expected, dtype, factor=8)
    for param, expected in zip(params, state, strict=True):
        close(optimizer.state[param]["mu"], expected, dtype, factor=32)


def test_lars_of_a_gradient_of_zero(backend, device):
    """Whose norm would divide by zero."""
    param = torch.ones(4, 2, device=device, requires_grad=True)
    param.grad = torch.zeros(4, 2, device=device)
    LARS([param], 0.5).step()
    assert (param == 1).all()


def test_lars_norms_are_the_same_every_time(backend, device):
    """Whatever the threads do: sums of fixed parts in a fixed order."""
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        param = torch.linspace(-1, 1, 600_001, device=device).repeat(2, 1).requires_grad_()
        param.grad = param.detach().flip(1).sin()
        LARS([param], 0.5, 0.1).step()
        results.append(param.detach())
    if backend == "native":
        assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_dtypes(backend, device, kind, dtype):
    """One rounding per store: against the same step in float64 from the same rounded start."""
    params = parameters(device, dtype)
    exact = [param.detach().double().clone().requires_grad_() for param in params]
    keys = keys_of(params)
    exact_keys = [key.double().clone() for key in keys]
    for made, followers in ((params, keys), (exact, exact_keys)):
        give_gradients(made, 0)
        make(kind, made, ema=zip(followers, made, strict=True), m=0.9).step()
    for got, want in zip([*params, *keys], [*exact, *exact_keys], strict=True):
        assert got.dtype == dtype
        close(got, want, dtype, factor=2 if dtype.itemsize == 2 else 8)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_is_torchs_with_any_instructions(isa, options):
    test_sgd_is_torchs_bit_for_bit("native", None, "cpu", options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_dtypes_with_any_instructions(isa, kind, dtype):
    test_dtypes("native", "cpu", kind, dtype)


@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_slices_mixed_dtypes_and_odd_layouts(backend, device, kind):
    """Gradients that are views into a bucket, transposes, keys of another dtype: by kernel or not."""
    flat = torch.randn(400, device=device)
    shapes = [(7, 9), (64,), (9, 7), (5, 4)]
    params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    params[2] = torch.randn(7, 9, device=device).t().requires_grad_()
    grads = [flat[1:64].view(7, 9), flat[65:129], flat[129:192].view(9, 7), flat[193:213].view(5, 4)]
    keys = [torch.randn(shape, device=device) for shape in shapes]
    keys[3] = keys[3].bfloat16()
    exact = [param.detach().double().clone().requires_grad_() for param in params]
    exact_keys = [key.double().clone() for key in keys]
    before = flat.clone()
    for param, other, grad in zip(params, exact, grads, strict=True):
        param.grad, other.grad = grad, grad.double()
    make(kind, params, ema=zip(keys, params, strict=True), m=0.9).step()
    make(kind, exact, ema=zip(exact_keys, exact, strict=True), m=0.9).step()
    for got, want in zip([*params, *keys], [*exact, *exact_keys], strict=True):
        close(got, want, got.dtype, factor=8)
    assert torch.equal(flat, before)  # gradients are read only


@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_numbers_as_tensors(backend, device, kind):
    ours, theirs = parameters(device), parameters(device)
    keys, want = keys_of(ours), keys_of(theirs)
    lr, m = torch.tensor(0.1, device=device), torch.tensor(0.9, dtype=torch.float64, device=device)
    for params, followers, momentum in ((ours, keys, m), (theirs, want, 0.9)):
        give_gradients(params, 0)
        optimizer = make(kind, params, ema=zip(followers, params, strict=True), m=momentum)
        if momentum is m:
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for got, expected in zip([*ours, *keys], [*theirs, *want], strict=True):
        close(got, expected, torch.float32)
