"""Linear evaluation: gradient against autograd, steps against torch.optim.SGD, and scikit-learn."""

import json
import re
from dataclasses import replace

import pytest
import torch
from largest import Largest
from torch import nn
from torch.nn import functional as F

from moco_fast.data.augment import AugmentConfig, center_view, random_view
from moco_fast.data.datasets import load_dataset
from moco_fast.data.images import Dataset, ImageSet, MemoryImages
from moco_fast.evaluate.features import View, features_of
from moco_fast.evaluate.frozen import BackboneMovedError, check_unmoved, fingerprint
from moco_fast.evaluate.heads import Heads
from moco_fast.evaluate.linear import LinearConfig, Scaler, evaluate_linear, hold_out, train_heads
from moco_fast.models.resnet import small_resnet
from moco_fast.train import checkpoint
from moco_fast.train.build import build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import Facts
from moco_fast.train.pretrained import load_pretrained

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

from moco_fast.commands import run

CPU = torch.device("cpu")
CONFIG = LinearConfig(epochs=3, batch_size=32, lr=(0.1, 1.0, 10.0))


def clusters(count, classes=5, features=9, seed=1, spread=0.6):
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    return centres[labels] + spread * torch.randn(count, features, generator=rng), labels


def with_ones(x):
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_is_autograds(groups):
    x, labels = clusters(37)
    x = with_ones(x.double())
    heads = Heads(9, 5, (1.0,) * 4, weight_decay=0.0, momentum=0.9, seed=0, like=x)
    heads.weight.copy_(torch.randn_like(heads.weight))
    share = torch.rand(groups, 37, dtype=torch.float64)
    logits = heads.logits(x).clone().requires_grad_()
    losses = F.cross_entropy(logits, labels.expand(4, -1), reduction="none")  # (L, B)
    (losses.view(groups, -1, 37) * share[:, None]).sum().backward()
    assert torch.allclose(heads.gradient(x, labels, share), logits.grad.view(20, 37), atol=1e-14)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_steps_are_sgds(weight_decay):
    """Two heads, batches of odd sizes, a falling rate: the weights of torch.optim.SGD on nn.Linear."""
    x, labels = clusters(101)
    x, rates = x.double(), (0.3, 3.0)
    heads = Heads(9, 5, rates, weight_decay=weight_decay, momentum=0.9, seed=0, like=x)
    for head, lr in zip(heads.weight.view(2, 5, 10).clone(), rates, strict=True):
        layer = nn.Linear(9, 5, dtype=torch.float64)
        layer.load_state_dict({"weight": head[:, :-1], "bias": head[:, -1]})
        sgd = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
        for step, (part, label) in enumerate(zip(x.split(23), labels.split(23), strict=True)):
            sgd.param_groups[0]["lr"] = lr * 0.1 ** (step > 2)
            sgd.zero_grad()
            F.cross_entropy(layer(part), label).backward()
            sgd.step()
        if lr == rates[0]:
            for step, (part, label) in enumerate(zip(x.split(23), labels.split(23), strict=True)):
                share = torch.full((1, len(part)), 1 / len(part), dtype=torch.float64)
                heads.step(with_ones(part), label, share, 0.1 ** (step > 2))
        want = torch.cat([layer.weight, layer.bias[:, None]], 1)
        assert torch.allclose(heads.weight.view(2, 5, 10)[rates.index(lr)], want, rtol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_sweep_is_its_runs(normalize):
    train, test = clusters(203), clusters(101, seed=2)
    config = replace(CONFIG, normalize=normalize)
    together = train_heads(*train, *test, 5, config)
    for i, lr in enumerate(config.lr):
        alone = train_heads(*train, *test, 5, replace(config, lr=(lr,)))
        assert alone.best.held_out is None
        assert (alone.best.acc1, alone.best.acc5) == (together.heads[i].acc1, together.heads[i].acc5)
        if i == together.chosen:
            assert torch.allclose(alone.weight, together.weight, rtol=1e-4, atol=1e-5)
            assert torch.equal(alone.classes, together.classes)


@pytest.mark.parametrize("normalize", [False, True])
def test_features_are_not_copied_whole(normalize):
    """Those of a million images fill a GPU."""
    train, test = clusters(2003), clusters(101, seed=2)
    with Largest() as largest:
        train_heads(*train, *test, 5, replace(CONFIG, normalize=normalize))
    assert largest.elements <= train[0].numel()  # scaled, or with the ones of the bias, they have more


def test_twins_do_not_see_what_is_held_out():
    """Random labels that any head which sees them learns by heart: held-out accuracy is that of guessing."""
    x, labels = torch.randn(200, 400), torch.randint(5, (200,))
    result = train_heads(x, labels, x, labels, 5, replace(CONFIG, epochs=30))
    assert result.best.acc1 == 1.0
    assert all(head.held_out < 0.6 for head in result.heads)


def test_choice_is_by_held_out_accuracy():
    train, test = clusters(300), clusters(101, seed=2)
    result = train_heads(*train, *test, 5, replace(CONFIG, lr=(1e-5, 1.0, 1e5)))
    assert [head.lr for head in result.heads] == [1e-5, 1.0, 1e5]
    best = max(head.held_out for head in result.heads)
    assert result.best.held_out == best > 0.7 and result.best.lr == 1.0


def test_same_seed_same_result():
    train, test = clusters(203), clusters(101, seed=2)
    first, second, other = (train_heads(*train, *test, 5, replace(CONFIG, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first.weight, second.weight) and first.heads == second.heads
    assert not torch.equal(first.weight, other.weight)


def test_accuracy_is_scikit_learns():
    """On the digits' pixels: within a point and a half of logistic regression that converged."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    digits = load_dataset("digits")
    train, test = (s.images.pixels.flatten(1).float() / 255 for s in (digits.train, digits.test))
    labels, answers = digits.train.labels, digits.test.labels
    config = LinearConfig(epochs=30, batch_size=64, lr=(0.03, 0.3, 1.0), normalize=True)
    result = train_heads(train, labels, test, answers, 10, config)
    model = sklearn.LogisticRegression(max_iter=500).fit(train.numpy(), labels.numpy())
    assert abs(result.best.acc1 - model.score(test.numpy(), answers.numpy())) < 0.015
    assert result.best.acc1 > 0.93
    direct = (test @ result.weight.t() + result.bias).argmax(1)  # scaling is folded into the weights
    assert (direct == answers).double().mean().item() == pytest.approx(result.best.acc1, abs=0.003)
    assert result.best.acc5 == (result.classes == answers[:, None]).any(1).double().mean().item()


def test_normalizing_takes_the_scale_away():
    train, test = clusters(203), clusters(101, seed=2)
    shift, scale = torch.randn(9), torch.logspace(-3, 3, 9)
    moved = [((x * scale + shift), y) for x, y in (train, test)]
    config = replace(CONFIG, lr=(0.1,), normalize=True)
    one, two = train_heads(*train, *test, 5, config), train_heads(*moved[0], *moved[1], 5, config)
    assert abs(one.best.acc1 - two.best.acc1) <= 0.02
    constant = torch.cat([train[0], torch.full((203, 1), 7.0)], 1)
    scaled = Scaler.of(constant)(constant)
    assert torch.isfinite(scaled).all() and (scaled[:, 9] == 0).all() and (scaled[:, 10] == 1).all()


def test_schedule():
    assert [LinearConfig().factor(e) for e in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert LinearConfig(schedule=(2,)).factor(2) == pytest.approx(0.1)


def test_hold_out_takes_a_tenth_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 19 + [2] * 2 + [4])
    mask, single = hold_out(labels, 0)
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2, 4)] == [5, 1, 1, 0] and single == (4,)
    assert not torch.equal(mask, hold_out(labels, 1)[0]) and torch.equal(mask, hold_out(labels, 0)[0])


def test_a_rate_that_diverges_is_not_chosen():
    train, test = clusters(203), clusters(101, seed=2)
    result = train_heads(
        1e18 * train[0], train[1], 1e18 * test[0], test[1], 5, replace(CONFIG, lr=(1e-37, 1e20))
    )
    assert result.heads[1].diverged and result.chosen == 0
    with pytest.raises(ValueError, match=r"every head diverged at lr=\(1e\+20,\): give smaller ones"):
        train_heads(1e18 * train[0], train[1], 1e18 * test[0], test[1], 5, replace(CONFIG, lr=(1e20,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": ()}, "lr must hold one or several"),
        ({"lr": (1.0, 1.0)}, "lr must hold one or several different"),
        ({"lr": (0.0,)}, "lr must be above 0, got 0.0"),
        ({"lr": (float("nan"),)}, "lr must be finite and at least 0, got nan"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"schedule": (0,)}, "schedule must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0"),
        ({"momentum": 2.0}, "momentum must be in"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        LinearConfig(**change)


def test_feature_errors():
    (x, labels), test = clusters(50), clusters(20, seed=2)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 0 to 4"):
        train_heads(x, labels, *test, 3, CONFIG)
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        train_heads(x, labels, *test, 1, CONFIG)
    with pytest.raises(ValueError, match="train must be finite"):
        train_heads(x / 0, labels, *test, 5, CONFIG)
    with pytest.raises(ValueError, match="no class has two training images"):
        train_heads(x[:5], torch.arange(5), *test, 5, CONFIG)
    assert train_heads(x[:5], torch.arange(5), *test, 5, replace(CONFIG, lr=(1.0,))).heads[0].held_out is None


def small_dataset(labels=True):
    """Three classes of stripes: horizontal, vertical, none."""
    rng = torch.Generator().manual_seed(0)
    halves = []
    for count in (90, 30):
        y = torch.arange(count) % 3
        stripes = (torch.arange(12) // 2 % 2 * 120)[None, None].expand(count, 12, 12)
        pixels = torch.where((y == 0)[:, None, None], stripes.mT, stripes) * (y < 2)[:, None, None]
        pixels = pixels + torch.randint(0, 100, (count, 12, 12), generator=rng)
        halves.append(ImageSet(MemoryImages(pixels[:, None].to(torch.uint8)), y if labels else None))
    return Dataset("stripes", *halves, ("across", "down", "plain"), "made up")


@pytest.mark.parametrize("augment", [False, True])
def test_evaluate_leaves_the_backbone_alone(augment):
    network = nn.Sequential(small_resnet(8, width=8), nn.Identity())
    before, done = fingerprint(network), []
    config = LinearConfig(epochs=4, batch_size=32, lr=(0.3, 3.0), augment=augment, normalize=True)
    view = View(12, [0.4], [0.3], CPU)
    result = evaluate_linear(network, small_dataset(), view, config, done.append)
    assert fingerprint(network) == before and done == [1, 2, 3, 4]
    assert result.best.acc1 > 0.5 and result.best.acc5 == 1.0 and result.classes.shape == (30, 3)
    again = evaluate_linear(network, small_dataset(), view, config)
    assert torch.equal(result.weight, again.weight)


def test_a_backbone_that_moves_is_noticed():
    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, images):
            self.norm.train()
            return self.norm(images).flatten(1)

    with pytest.raises(BackboneMovedError, match=r"3 of 5 tensors changed: norm\.running_mean"):
        evaluate_linear(Trains(), small_dataset(), View(12, [0.4], [0.3], CPU), replace(CONFIG, epochs=1))
    network = nn.Linear(2, 2)
    before = fingerprint(network)
    network.weight.data[0, 0] = -0.0 if network.weight[0, 0] == 0 else 0.0
    with pytest.raises(BackboneMovedError, match="1 of 2 tensors changed: weight"):
        check_unmoved(before, network)


def test_no_labels():
    with pytest.raises(
        ValueError, match="data 'stripes' cannot be measured: the images have no class labels"
    ):
        evaluate_linear(nn.Flatten(), small_dataset(labels=False), View(12, [0.4], [0.3], CPU), CONFIG)


def crops_of(images, scale):
    crop = AugmentConfig(8, scale, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    return random_view(images, crop, [0.5], [0.2], torch.Generator().manual_seed(0))


def test_random_crops():
    """A crop of everything, not flipped, is the central view; a smaller one is another picture."""
    images = torch.randint(0, 256, (64, 1, 12, 12), dtype=torch.uint8)
    whole = center_view(images, 8, [0.5], [0.2])
    crops = crops_of(images, (1.0, 1.0))
    same = torch.isclose(crops, whole, atol=1e-4).flatten(1).all(1)
    flipped = torch.isclose(crops, whole.flip(3), atol=1e-4).flatten(1).all(1)
    assert (same | flipped).float().mean() > 0.9 and 0.2 < flipped.float().mean() < 0.8
    part = crops_of(images, (0.1, 0.3))
    assert part.shape == whole.shape and not torch.isclose(part, whole, atol=1e-2).flatten(1).all(1).any()


@pytest.fixture
def untrained(tmp_path):
    config = PretrainConfig(data="digits", width=8, dim=16, queue_size=64, batch_size=32)
    config = replace(config, augment=replace(config.augment, image_size=8))
    model = build_model(config, 1, Facts(100, 10))
    extras = {"config": config.to_dict(), "channels": 1, "mean": [0.3], "std": [0.4]}
    state = {"epoch": 0, "arch": config.arch, "optimizer": {}, "moco_fast": extras}
    checkpoint.write_atomic(
        tmp_path / "checkpoint.pth", state | {"state_dict": checkpoint.model_state(model)}
    )
    return tmp_path


def test_command(untrained, capsys):
    assert run(["linear", str(untrained), "--epochs", "5", "--lr", "0.1", "1"]) == 0
    out = capsys.readouterr().out
    assert "1,437 images to learn, 360 to test" in out and "chosen on held-out" in out
    shown = dict(re.findall(r"│ (raw pixels|random init|trained) +│ +([\d.]+)%", out))
    assert shown["random init"] == shown["trained"]
    folder = untrained / "linear-digits"
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.png", "linear.pth", "results.json"]
    results = json.loads((folder / "results.json").read_text())
    assert [head["lr"] for head in results["features"]["trained"]["heads"]] == [0.1, 1.0]
    for name, row in results["features"].items():
        assert shown[name] == f"{100 * row['chosen']['acc1']:.2f}"

    saved = torch.load(folder / "linear.pth", weights_only=True)
    assert list(saved)[:4] == ["epoch", "arch", "state_dict", "best_acc1"] and saved["arch"] == "small_resnet"
    network = small_resnet(10, width=8)
    network.load_state_dict({name.removeprefix("module."): v for name, v in saved["state_dict"].items()})
    digits = load_dataset("digits")
    logits = features_of(network, digits.test, torch.arange(360), View(8, [0.3], [0.4], CPU))
    accuracy = (logits.argmax(1) == digits.test.labels).double().mean().item()
    assert 100 * accuracy == pytest.approx(saved["best_acc1"], abs=0.3)
    with pytest.raises(checkpoint.CheckpointError, match="holds a classifier"):
        load_pretrained(folder / "linear.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "lr must be finite and at least 0"),
        (["--data", "nowhere/at/all"], "nowhere/at/all"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--arch", "resnet18"], "arch 'resnet18' takes images of 3 channels"),
    ],
)
def test_command_errors(untrained, capsys, arguments, message):
    assert run(["linear", str(untrained), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("moco-fast: ") and message in err
    assert not (untrained / "linear-digits").exists()


def test_command_refuses_several_processes(untrained, capsys, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert run(["linear", str(untrained)]) == 1
    assert "linear runs in one process" in capsys.readouterr().err
