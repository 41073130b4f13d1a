"""SGD, AdamW and LARS in training: state dicts, MoCo's own order, GradScaler, groups, graphs, bad input."""

import copy

import pytest
import torch
from optimizers import SHAPES, close, give_gradients, keys_of, make, parameters

import moco_fast
from moco_fast import native, reference
from moco_fast.models.backbones import SMALL_RESNET, backbone
from moco_fast.optim import LARS, SGD, AdamW

OP = "sgd_"  # of the backends that the fixtures ask; adamw_ has the same
TWINS = [(SGD, torch.optim.SGD, {"momentum": 0.9}), (AdamW, torch.optim.AdamW, {"weight_decay": 0.1})]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "options"), TWINS, ids=["SGD", "AdamW"])
def test_state_dicts_interchange(backend, device, ours, theirs, options, ours_first):
    """Two steps in one, two in the other: as four steps of torch's."""
    kinds = [ours, theirs] if ours_first else [theirs, ours]
    params, plain = parameters(device), parameters(device)
    want = theirs(plain, 0.01, **options)
    state = None
    for half, kind in enumerate(kinds):
        optimizer = kind(params, 0.01, **options)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in (2 * half, 2 * half + 1):
            for some, stepping in ((params, optimizer), (plain, want)):
                give_gradients(some, step)
                stepping.step()
        state = copy.deepcopy(optimizer.state_dict())
        expected = want.state_dict()["state"]
        for i, values in state["state"].items():
            assert values.keys() == expected[i].keys()
            for name, value in values.items():
                assert value.dtype == expected[i][name].dtype and value.shape == expected[i][name].shape
    for got, expected in zip(params, plain, strict=True):
        close(got, expected, torch.float32)


def test_state_that_cannot_be_continued_is_refused():
    params = [torch.ones(3, requires_grad=True)]
    other = torch.optim.AdamW(params, amsgrad=True)
    optimizer = AdamW(params)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="amsgrad must be False, got True: AdamW lacks it"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


def moco():
    torch.manual_seed(5)
    return moco_fast.MoCo(backbone(SMALL_RESNET, width=8), 16, 64, 0.9, 0.2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_moco_trains_as_with_the_ema_in_forward(place, nesterov):
    """N steps of both orders: the same parameters, and the same keys after the EMA the next forward makes."""
    name, device = place
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": nesterov}
    usual, fused = moco().to(device), moco().to(device)
    plain = torch.optim.SGD(usual.parameters(), **options)
    stepping = SGD(fused.parameters(), **options, ema=fused.move_ema_into_step(), m=fused.m)
    # The first forward's EMA averages equal encoders: the identity, but for a rounding, made here too.
    moco_fast.ema_update_(list(fused.encoder_k.parameters()), list(fused.encoder_q.parameters()), fused.m)
    for step in range(4):
        views = torch.randn(2, 8, 3, 16, 16).to(device)
        momentum = 0.9 + 0.02 * step
        usual.m, stepping.m = momentum, momentum + 0.02  # the momentum of the next forward
        if step == 0:
            usual.m = 0.9
        for model, optimizer in ((usual, plain), (fused, stepping)):
            optimizer.zero_grad()
            model.loss(*views).backward()
            with moco_fast.use_backend(name):  # of the step alone: no backend but the reference has every op
                optimizer.step()
    moco_fast.ema_update_(
        list(usual.encoder_k.parameters()), list(usual.encoder_q.parameters()), 0.9 + 0.02 * 4
    )
    for (name, got), want in zip(fused.state_dict().items(), usual.state_dict().values(), strict=True):
        if device == "cpu":
            assert torch.equal(got, want), name
        else:  # convolutions there add up in no fixed order
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_leaving_out_the_first_ema_changes_nothing_but_roundings():
    usual, fused = moco(), moco()
    SGD(fused.parameters(), 0.1, ema=fused.move_ema_into_step())
    views = torch.randn(2, 8, 3, 16, 16)
    torch.testing.assert_close(fused.loss(*views), usual.loss(*views), rtol=1e-5, atol=1e-6)
    assert not usual.ema_in_step and fused.ema_in_step


def test_a_step_that_a_grad_scaler_skips_moves_no_key(backend):
    param, key = torch.ones(3, requires_grad=True), torch.zeros(3)
    optimizer = SGD([param], 0.1, ema=[(key, param)], m=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((param * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert key.tolist() == [0] * 3 and param.tolist() == [1] * 3
    optimizer.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert (key == param / 2).all() and (param < 1).all()


def test_keys_of_parameters_that_the_optimizer_does_not_have(backend):
    trained, frozen = torch.ones(3, requires_grad=True), torch.ones(2)
    keys = [torch.zeros(3), torch.zeros(2)]
    optimizer = SGD([trained], 0.1, ema=zip(keys, [trained, frozen], strict=True), m=0.75)
    optimizer.step()
    assert all((key == 0.25).all() for key in keys) and trained.tolist() == [1.0] * 3


def test_keys_follow_in_a_kernel_of_their_own_where_the_step_has_none(monkeypatch):
    """As on a GPU without the CUDA kernels, where Triton has the EMA alone."""
    if reason := native.unavailable():
        pytest.skip(reason)

    def trained():
        params = parameters()
        keys = keys_of(params)
        optimizer = make(AdamW, params, ema=list(zip(keys, params, strict=True)), m=0.9)
        give_gradients(params, 0, skip=2)
        optimizer.step()
        return [*params, *keys]

    want, seen, step = trained(), [], reference.adamw_
    monkeypatch.setattr(native.compiled, "OPS", ("ema_update_",))
    monkeypatch.setattr(reference, "adamw_", lambda *args: (seen.append(args[5]), step(*args)))
    for got, expected in zip(trained(), want, strict=True):
        close(got.detach(), expected.detach(), torch.float32)
    assert seen == [[None] * (len(SHAPES) - 1)]


@pytest.mark.parametrize("kind", [SGD, AdamW], ids=lambda kind: kind.__name__)
def test_a_state_of_another_layout_is_laid_out_as_the_parameters(kind):
    """A model in channels_last goes on with the checkpoint of a contiguous one."""

    def of(layout):
        param = torch.ones(16, 3, 3, 3).to(memory_format=layout).requires_grad_()
        optimizer = make(kind, [param])
        give_gradients([param], 0)
        optimizer.step()
        return param, optimizer

    param, optimizer = of(torch.channels_last)
    other = of(torch.contiguous_format)[1].state_dict()
    optimizer.load_state_dict(other)
    for name, value in optimizer.state[param].items():
        assert torch.equal(value, other["state"][0][name])
        assert value.ndim == 0 or value.stride() == param.stride()


def test_groups_closures_and_copies(backend):
    first, second = torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    key = torch.zeros(3)
    groups = [{"params": [first], "lr": 1.0}, {"params": [second], "weight_decay": 0.5}]
    optimizer = SGD(groups, 0.1, ema=[(key, first)], m=0.5)

    def closure():
        optimizer.zero_grad()
        loss = first.sum() + second.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 7
    assert (
        first.tolist() == [0] * 3 and torch.allclose(second, torch.tensor(0.85)) and key.tolist() == [0] * 3
    )
    other = copy.deepcopy(optimizer)
    assert other.m == 0.5 and len(other._keys) == 1
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_count_that_is_a_number():
    """As torch.optim saved it before it was a tensor."""
    param = torch.ones(3, requires_grad=True)
    optimizer, counted = AdamW([param]), AdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = 1
    counted.load_state_dict(state)
    counted.step()
    count = counted.state[param]["step"]
    assert count == 2 and count.dtype == torch.float32


def test_autograd_notices_the_write(backend):
    param, key = torch.ones(3, requires_grad=True), torch.zeros(3)
    y, z = (param * param).sum(), (torch.ones(3, requires_grad=True) * key).sum()
    param.grad = torch.ones(3)
    SGD([param], 0.1, ema=[(key, param)]).step()
    for output in (y, z):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_versions_of_the_state_rise(backend, kind):
    param = torch.ones(3, 2, requires_grad=True)
    param.grad = torch.ones(3, 2)
    optimizer = make(kind, [param])
    optimizer.step()
    before = {name: value._version for name, value in optimizer.state[param].items()}
    optimizer.step()
    for name, version in before.items():
        assert optimizer.state[param][name]._version > version, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [SGD, AdamW, LARS])
def test_graph_replays_what_eager_does(kind):
    """With lr and m that change, and AdamW's step counted, on the device."""
    sides = []
    for _ in range(2):
        params = parameters("cuda")
        keys = keys_of(params)
        lr, m = torch.tensor(0.1, device="cuda"), torch.tensor(0.9, device="cuda", dtype=torch.float64)
        optimizer = make(kind, params, ema=zip(keys, params, strict=True), m=m)
        optimizer.param_groups[0]["lr"] = lr
        give_gradients(params, 0)
        optimizer.step()  # allocates the state
        sides.append((params, keys, lr, m, optimizer))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    first = make(kind, [torch.ones(3, device="cuda", requires_grad=True)])
    give_gradients(first.param_groups[0]["params"], 0)
    with (
        pytest.raises(RuntimeError, match="before capturing a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        first.step()
    with torch.cuda.graph(graph):
        sides[0][4].step()
    for step in range(3):
        for captured, (_, _, lr, m, optimizer) in zip((True, False), sides, strict=True):
            lr.fill_(0.1 / (step + 1))
            m.fill_(0.9 + 0.02 * step)
            graph.replay() if captured else optimizer.step()
    for got, want in zip([*sides[0][0], *sides[0][1]], [*sides[1][0], *sides[1][1]], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda p: SGD(p, -1.0), ValueError, "lr must be finite and at least 0, got -1.0"),
        (lambda p: SGD(p, "fast"), TypeError, "lr must be a number, got str 'fast'"),
        (lambda p: SGD(p, momentum=-0.1), ValueError, "momentum must be finite and at least 0, got -0.1"),
        (lambda p: SGD(p, nesterov=True), ValueError, "nesterov needs momentum above 0 .* got momentum=0"),
        (
            lambda p: SGD(p, momentum=0.9, dampening=0.1, nesterov=True),
            ValueError,
            "nesterov needs .* dampening 0, got momentum=0.9, dampening=0.1",
        ),
        (lambda p: SGD(p, weight_decay=float("nan")), ValueError, "weight_decay must be finite .* got nan"),
        (lambda p: SGD(p, m=1.5), ValueError, r"m must be in \[0, 1\], got 1.5"),
        (lambda p: SGD(p, ema=[(torch.zeros(4), p[0])]), ValueError, r"sources\[0\] must have the shape"),
        (lambda p: SGD(p, ema=[(p[0], p[0])]), ValueError, r"targets\[0\] requires grad"),
        (lambda p: SGD(p, ema=[(torch.zeros(3), p[0])] * 2), ValueError, r"ema\[1\] names a query parameter"),
        (lambda p: SGD([{"params": p, "lr": -2}]), ValueError, "lr must be finite and at least 0, got -2"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda p: AdamW(p, eps=-1), ValueError, "eps must be finite and at least 0, got -1"),
        (lambda p: AdamW(p, amsgrad=True), ValueError, "amsgrad must be False, got True"),
        (lambda p: LARS(p, trust_coefficient=0), ValueError, "trust_coefficient must be above 0, got 0"),
    ],
)
def test_bad_arguments(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it([torch.zeros(3, requires_grad=True)])


def test_bad_steps_change_nothing(backend):
    first, second = torch.ones(3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    key = torch.zeros(3)
    first.grad, second.grad = torch.ones(3), torch.ones(4, 2).to_sparse()
    optimizer = SGD([{"params": [first]}, {"params": [second]}], 0.1, ema=[(key, first)])
    with pytest.raises(RuntimeError, match="SGD does not support sparse gradients"):
        optimizer.step()
    second.grad = None
    for value, error in ((1.5, ValueError), ("a", TypeError), (torch.tensor(1), TypeError)):
        optimizer.m = value
        with pytest.raises(error, match="m "):
            optimizer.step()
    optimizer.m = 0.9
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match="lr is on meta"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).half()
    with pytest.raises(TypeError, match="lr as a tensor must be float32 or float64, got torch"):
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got -1"):
        optimizer.step()
    assert first.tolist() == [1] * 3 and key.tolist() == [0] * 3
