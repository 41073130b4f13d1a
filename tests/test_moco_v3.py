"""MoCo v3: constructor, state dict and trajectories of the official classes, in one process and over two."""

import copy
import io
import math
from functools import partial

import methods
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import moco_fast
from bench.eager_moco_v3 import EagerMoCoV3, EagerMoCoV3ViT
from moco_fast.models import steps, vits
from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT, momentum_at
from moco_fast.models.resnet import small_resnet

OP = "contrast"


class TinyNet(nn.Module):
    """Convolution, a norm where wanted, a head named ``fc``."""

    def __init__(self, num_classes=10, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def tiny_vit(num_classes):
    return vits.vit(16, 2, 2, True, num_classes, img_size=8, patch_size=4, in_chans=3)


KINDS = {"resnet": (EagerMoCoV3, MoCo_ResNet, TinyNet), "vit": (EagerMoCoV3ViT, MoCo_ViT, tiny_vit)}


def build(cls=MoCo_ResNet, encoder=TinyNet, dim=16, mlp_dim=24, T=0.3, seed=3):
    torch.manual_seed(seed)
    return cls(encoder, dim, mlp_dim, T)


def views(batch=12, count=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)

    def draw():
        noise = torch.randn(batch, 3, 8, 8, generator=generator, device="cpu", dtype=torch.float64)
        return noise.to(torch.get_default_device(), dtype)

    for _ in range(count):
        x1 = draw()
        yield x1, x1 + 0.3 * draw()


def train(model, optimizer, *, steps=20, batch=12, part=slice(None)):
    dtype = next(model.parameters()).dtype
    losses = []
    for step, (x1, x2) in enumerate(views(batch, steps, dtype)):
        loss = model(x1[part], x2[part], momentum_at(step / steps, 0.9))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def assert_same_state(got, want, **tolerance):
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_float64(kind):
    eager, ours, encoder = KINDS[kind]
    want_model, model = build(eager, encoder).double(), build(ours, encoder).double()
    ((x1, x2),) = views(dtype=torch.float64)
    want, loss = want_model(x1, x2, 0.7), model(x1, x2, 0.7)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    want.backward()
    loss.backward()
    for (name, p), q in zip(model.named_parameters(), want_model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert_same_state(model.state_dict(), want_model.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["SGD", "LARS", "AdamW"])
def test_twenty_steps_equal_the_official_semantics(kind, optimizer):
    """In float64: AdamW turns rounding into whole steps where a gradient is zero, as that of keys' biases."""
    eager, ours, encoder = KINDS[kind]
    make = {
        "SGD": sgd,
        "LARS": lambda model: moco_fast.LARS(model.parameters(), lr=0.5, weight_decay=1e-4),
        "AdamW": lambda model: moco_fast.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
    }[optimizer]
    want_model, model = build(eager, encoder).double(), build(ours, encoder).double()
    want, got = train(want_model, make(want_model)), train(model, make(model))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=0)
    assert want[-1] < want[0]
    state = model.state_dict()
    assert_same_state(state, want_model.state_dict(), rtol=1e-7, atol=1e-8)


def test_what_is_frozen_stays_in_both_encoders():
    """To the last bit, which an average of two equal numbers need not keep."""
    model = build(MoCo_ViT, tiny_vit)
    before = copy.deepcopy(model.state_dict())
    train(model, sgd(model), steps=5)
    state = model.state_dict()
    for encoder in ("base_encoder", "momentum_encoder"):
        assert torch.equal(state[f"{encoder}.pos_embed"], vits.sin_cos_positions(2, 16))
        for name in ("weight", "bias"):
            name = f"{encoder}.patch_embed.proj.{name}"
            assert torch.equal(state[name], before[name])
        assert not torch.equal(state[f"{encoder}.cls_token"], before[f"{encoder}.cls_token"])


def test_what_is_frozen_later_is_followed():
    """Layers that are frozen where both encoders differ, all of them too: the official loop goes on."""
    want_model, model = build(EagerMoCoV3).double(), build().double()
    for each in (want_model, model):
        train(each, sgd(each), steps=3)
        each.base_encoder.conv.load_state_dict({"weight": torch.ones(8, 3, 3, 3)})
        each.base_encoder.conv.requires_grad_(False)
        train(each, sgd(each), steps=3)
        each.base_encoder.requires_grad_(False)
        train(each, sgd(each), steps=3)
    assert_same_state(model.state_dict(), want_model.state_dict(), rtol=1e-9, atol=1e-10)


def test_steps_in_float32(backend):
    model, want_model, exact_model = build(), build(EagerMoCoV3), build(EagerMoCoV3).double()
    rounded = backend == "triton"  # operands in fp16; its interpreter is slow
    steps = 4 if rounded else 20
    found = [train(m, sgd(m), steps=steps) for m in (model, want_model, exact_model)]
    methods.assert_as_near(*found, rtol=1e-3 if rounded else 1e-5)
    assert_same_state(model.state_dict(), want_model.state_dict(), rtol=1e-4, atol=1e-2 if rounded else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_initial_state(kind):
    eager, ours, encoder = KINDS[kind]
    model = build(ours, encoder)
    assert_same_state(model.state_dict(), build(eager, encoder).state_dict(), rtol=0, atol=0)
    followers = dict(model.momentum_encoder.named_parameters())
    for name, base in model.base_encoder.named_parameters():
        assert torch.equal(base, followers[name]) and not followers[name].requires_grad
    assert all(p.requires_grad for p in model.predictor.parameters())


def shapes_of(state, prefix):
    names = [name for name in state if name.startswith(prefix) and "tracked" not in name]
    return {name.removeprefix(prefix): tuple(state[name].shape) for name in names}


def norm(index, dim, affine=True):
    kinds = ("weight", "bias", "running_mean", "running_var") if affine else ("running_mean", "running_var")
    return {f"{index}.{kind}": (dim,) for kind in kinds}


def order_of(state):
    return list(dict.fromkeys(name.split(".")[0] for name in state))


def test_resnet50_state_dict():
    with torch.device("meta"):
        base = partial(torchvision.models.__dict__["resnet50"], zero_init_residual=True)
        model = MoCo_ResNet(base, 256, 4096, 1.0)
    state = model.state_dict()
    assert len(state) == 663
    assert order_of(state) == ["base_encoder", "momentum_encoder", "predictor"]
    projector = {"0.weight": (4096, 2048), **norm(1, 4096), "3.weight": (256, 4096), **norm(4, 256, False)}
    for encoder in ("base_encoder", "momentum_encoder"):
        assert shapes_of(state, f"{encoder}.fc.") == projector
    assert shapes_of(state, "predictor.") == {
        "0.weight": (4096, 256), **norm(1, 4096), "3.weight": (256, 4096),
    }  # fmt: skip


def test_vit_base_state_dict():
    with torch.device("meta"):
        model = MoCo_ViT(partial(vits.__dict__["vit_base"], stop_grad_conv1=True), 256, 4096, 0.2)
    state = model.state_dict()
    assert len(state) == 342
    assert order_of(state) == ["base_encoder", "momentum_encoder", "predictor"]
    assert state["base_encoder.pos_embed"].shape == (1, 197, 768)
    projector = {
        "0.weight": (4096, 768), **norm(1, 4096), "3.weight": (4096, 4096), **norm(4, 4096),
        "6.weight": (256, 4096), **norm(7, 256, False),
    }  # fmt: skip
    for encoder in ("base_encoder", "momentum_encoder"):
        assert shapes_of(state, f"{encoder}.head.") == projector
    assert shapes_of(state, "predictor.") == {
        "0.weight": (4096, 256), **norm(1, 4096), "3.weight": (256, 4096), **norm(4, 256, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "head", "width", "channels"),
    [
        (partial(small_resnet, width=4), "fc", 32, 1),
        (partial(torchvision.models.convnext_tiny), "classifier.2", 768, 3),
    ],
)
def test_any_encoder_with_a_head(encoder, head, width, channels):
    model = MoCo_ResNet(encoder, 8, 16)
    images = torch.randn(2, channels, 32, 32)
    model(images, images, 0.9).backward()
    assert model.head == head and model.features(images).shape == (2, width)


@pytest.mark.parametrize(("first", "columns"), [(0, 12), (7, 30)])
def test_stats_are_those_of_the_logits(monkeypatch, first, columns):
    monkeypatch.setattr(steps, "BLOCK", columns * 5)  # 5 queries at a time
    q, k = torch.randn(12, 6), torch.randn(columns, 6)
    k[first : first + 12] += q
    stats = steps.pair_stats(q, k, first + torch.arange(12))
    methods.assert_pair_stats(stats, q, k, first + torch.arange(12))
    assert 0 < stats["acc1"] < 1


def test_return_stats():
    model, plain = build(), build()
    ((x1, x2),) = views()
    loss, stats = model(x1, x2, 0.9, return_stats=True)
    assert torch.equal(loss, plain(x1, x2, 0.9))
    assert set(stats) == {"pos_sim", "neg_sim", "acc1"}
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())


def test_eval_changes_nothing():
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    ((x1, x2),) = views()
    assert torch.equal(model(x1, x2, 0.5), model(x1, x2, 0.5))
    model.features(x1)
    assert unchanged(model, before)


def test_training_moves_statistics_of_both_encoders_apart():
    """Parameters follow, buffers do not: the momentum encoder has statistics of its own."""
    model = build()
    train(model, sgd(model), steps=3)
    base, follower = model.base_encoder.bn, model.momentum_encoder.bn
    assert base.num_batches_tracked == follower.num_batches_tracked == 6
    assert not torch.equal(base.running_mean, follower.running_mean)


def test_momentum_as_a_tensor():
    ((x1, x2),) = views()
    states = []
    for m in (0.75, torch.tensor(0.75)):
        model = build()
        with torch.no_grad():
            for p in model.base_encoder.parameters():
                p.add_(1)
        model(x1, x2, m)
        states.append(model.state_dict())
    assert_same_state(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("progress", "want"), [(0.0, 0.99), (0.5, 0.995), (1.0, 1.0), (0.25, 1 - 0.005 * (1 + math.sqrt(0.5)))]
)
def test_momentum_schedule(progress, want):
    assert momentum_at(progress, 0.99) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize(
    ("progress", "m0", "message"),
    [(1.1, 0.9, r"progress must be in \[0, 1\], got 1.1"), (0.5, -0.1, r"m0 must be in \[0, 1\], got -0.1")],
)
def test_momentum_schedule_out_of_range(progress, m0, message):
    with pytest.raises(ValueError, match=message):
        momentum_at(progress, m0)


@pytest.mark.parametrize("kind", KINDS)
def test_synchronised_batch_norm(kind):
    """In one process it is batch norm."""
    _, ours, encoder = KINDS[kind]
    model = build(ours, encoder)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(build(ours, encoder))
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in converted.modules())
    want, got = train(model, sgd(model), steps=3), train(converted, sgd(converted), steps=3)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert_same_state(converted.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast(kind):
    _, ours, encoder = KINDS[kind]
    model, full = build(ours, encoder), build(ours, encoder)
    ((x1, x2),) = views()
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = model(x1, x2, 0.9, return_stats=True)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() / full(x1, x2, 0.9).item() - 1) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert all(torch.isfinite(value) for value in stats.values())


def test_grad_scaler():
    """Losses scaled by a power of two and gradients scaled back: the same step."""
    plain, scaled = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizers = [sgd(model) for model in (plain, scaled)]
    for x1, x2 in views(count=3):
        plain(x1, x2, 0.9).backward()
        scaler.scale(scaled(x1, x2, 0.9)).backward()
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_same_state(scaled.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


def test_copies_and_checkpoints_go_on_alike():
    model = build()
    train(model, sgd(model), steps=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = build(seed=9)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others = [copy.deepcopy(model), loaded, copy.deepcopy(model).to(memory_format=torch.channels_last)]
    want = train(model, sgd(model), steps=3)
    for other in others:
        torch.testing.assert_close(train(other, sgd(other), steps=3), want, rtol=1e-5, atol=0)


X = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:3], 0.9), ValueError, "x2 must hold as many images as x1, 4, got 3"),
        ((X[:0], X[:0], 0.9), ValueError, r"x1 must hold at least 1 images, got shape \(0, 3, 8, 8\)"),
        (([1.0], X, 0.9), TypeError, r"x1 must be a tensor of images \(N, ...\), got list"),
        ((X, X[0, 0, 0, 0], 0.9), TypeError, r"x2 must be a tensor of images \(N, ...\), got shape \(\)"),
        ((X, X, 1.5), ValueError, r"m must be in \[0, 1\], got 1.5"),
        ((X, X, torch.tensor(-0.5)), ValueError, r"m must be in \[0, 1\], got -0.5"),
        ((X, X, float("nan")), ValueError, r"m must be in \[0, 1\], got nan"),
        ((X, X, torch.ones(1)), TypeError, "m must be a number or a 0-d floating-point tensor"),
        ((X, X, "0.9"), TypeError, "m must be a number, got str"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_steps_change_nothing(arguments, error, message, training):
    model = build().train(training)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model(*arguments)
    assert unchanged(model, before)
    model.T = 0.0
    with pytest.raises(ValueError, match=r"T must be finite and above 0, got 0.0"):
        model(X, X, 0.9)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"mlp_dim": 2.5}, TypeError, "mlp_dim must be an integer, got float 2.5"),
        ({"T": -1.0}, ValueError, "T must be finite and above 0, got -1.0"),
        ({"encoder": "resnet50"}, TypeError, "base_encoder must be callable.*got str"),
        (
            {"encoder": lambda num_classes: nn.Sequential(nn.Linear(3, 4))},
            ValueError,
            "must have a linear head",
        ),
    ],
)
@pytest.mark.parametrize("cls", [MoCo_ResNet, MoCo_ViT])
def test_bad_constructor_arguments(cls, options, error, message):
    with pytest.raises(error, match=message):
        build(cls, **options)
