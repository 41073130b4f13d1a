"""Backbones out of checkpoints: this library's and the official ones, strictly or with a reason."""

from dataclasses import replace

import pytest
import torch
from torchvision import models

import moco_fast
from moco_fast.data.augment import AugmentConfig
from moco_fast.models.backbones import backbone
from moco_fast.train import checkpoint
from moco_fast.train.build import IMAGENET_MEAN, build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import METHODS, Facts
from moco_fast.train.pretrained import load_pretrained

CONFIG = PretrainConfig(data="digits", width=8, dim=16, queue_size=64, batch_size=32, seed=3)


def save(path, state, *, arch="resnet18", **more):
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "optimizer": {}, **more}, path)
    return path


def stirred(model):
    """Weights and statistics that no initialisation has."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                change = 0.05 * torch.rand_like(value)
                value.add_(change if value.ndim == 1 else change * value)
    return model


def official(mlp):
    torch.manual_seed(1)
    return stirred(moco_fast.MoCo(models.resnet18, 16, 32, mlp=mlp))


def of_this_library(path, model, config=CONFIG, **changes):
    extras = {"config": config.to_dict(), "channels": 1, "mean": [0.3], "std": [0.4]} | changes
    return save(path, checkpoint.model_state(model), arch=config.arch, moco_fast=extras)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("mlp", [False, True])
def test_official_v1_and_v2(tmp_path, mlp, prefix):
    model = official(mlp)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "m.pth.tar")
    loaded = load_pretrained(tmp_path / "m.pth.tar")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.backbone(images), model.eval().features(images))
    assert (loaded.width, loaded.arch, loaded.method, loaded.image_size) == (512, "resnet18", "moco", 224)
    assert (loaded.channels, loaded.mean, loaded.data) == (3, IMAGENET_MEAN, None)
    assert not any(module.training for module in loaded.backbone.modules())


def test_official_v3(tmp_path):
    """."""
    network = stirred(models.resnet18())
    want = network.eval().state_dict()
    state = {f"module.base_encoder.{n}": v for n, v in want.items() if not n.startswith("fc.")}
    state |= {f"module.momentum_encoder.{n}": v + 1 for n, v in want.items()}
    for name in ("base_encoder.fc.0.weight", "base_encoder.fc.1.running_mean", "predictor.0.weight"):
        state["module." + name] = torch.zeros(1)
    loaded = load_pretrained(save(tmp_path / "v3.pth", state))
    network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.backbone(images), network(images)) and loaded.method == "moco-v3"


@pytest.mark.parametrize("arch", ["small_resnet", "densenet121", "mobilenet_v3_small"])
def test_own_checkpoints(tmp_path, arch):
    """Whatever the head is called; from the file or its folder, with what the config says."""
    channels = 1 if arch == "small_resnet" else 3
    torch.manual_seed(0)
    model = moco_fast.MoCo(backbone(arch, width=8, in_channels=channels), 16, 64, mlp=True)
    config = replace(CONFIG, arch=arch, augment=replace(CONFIG.augment, image_size=32))
    file = of_this_library(
        tmp_path / "checkpoint.pth", stirred(model), config, channels=channels, mean=[0.3] * channels
    )
    images = torch.randn(2, channels, 32, 32)
    for path in (file, tmp_path):
        loaded = load_pretrained(path)
        features = loaded.backbone(images)
        assert torch.equal(features, model.eval().features(images)) and features.shape == (2, loaded.width)
    assert (loaded.image_size, loaded.data, loaded.canvas) == (32, "digits", 2.0)
    assert (loaded.channels, loaded.mean, loaded.method) == (channels, (0.3,) * channels, "moco-v2")


@pytest.mark.parametrize("prefix", ["encoder", "teacher", "base_encoder"])
def test_other_methods_of_this_library(tmp_path, prefix):
    model = stirred(build_model(CONFIG, 1, Facts(100, 10)))
    state = {n.replace("encoder_q.", prefix + "."): v for n, v in model.state_dict().items()}
    state = {"module." + n: v for n, v in state.items() if not n.startswith("encoder_k.")}
    config = CONFIG.to_dict() | {"method": "another", "a field of another method": 1}
    extras = {"config": config, "channels": 1, "mean": [0.3], "std": [0.4]}
    loaded = load_pretrained(save(tmp_path / "c.pth", state, arch="small_resnet", moco_fast=extras))
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded.backbone(images), model.eval().features(images)) and loaded.method == "another"


def test_fresh_is_the_initialisation_of_the_run(tmp_path):
    model = build_model(CONFIG, 1, Facts(100, 10)).eval()
    images = torch.randn(2, 1, 28, 28)
    want = model.features(images)
    loaded = load_pretrained(of_this_library(tmp_path / "c.pth", stirred(model)))
    state = torch.random.get_rng_state()
    first, second = loaded.fresh(), loaded.fresh()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(images), want) and torch.equal(second(images), want)
    assert first is not second and not torch.equal(loaded.backbone(images), want)


@pytest.mark.parametrize("arch", ["small_resnet", "resnet18", "small_vit"])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_is_that_of_every_method(tmp_path, method, arch):
    config = replace(CONFIG.with_method(method), arch=arch, augment=AugmentConfig(image_size=32))
    model = build_model(config, 3, Facts(100, 10)).eval()
    images = torch.randn(2, 3, 32, 32)
    statistics = {"channels": 3, "mean": [0.3] * 3, "std": [0.4] * 3}
    path = of_this_library(tmp_path / "c.pth", model, config, **statistics)
    assert torch.equal(load_pretrained(path).fresh()(images), model.features(images))


def test_image_size_can_be_chosen(tmp_path):
    path = of_this_library(tmp_path / "c.pth", build_model(CONFIG, 1, Facts(100, 10)))
    assert load_pretrained(path, image_size=40).image_size == 40
    densenet = models.densenet121().state_dict()
    state = {f"encoder_q.{n}": v for n, v in densenet.items()}
    densenet = save(tmp_path / "d.pth", state, arch="densenet121")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_pretrained(path, image_size=0)
    with pytest.raises(ValueError, match=r"arch 'densenet121' cannot take images of image_size=8 pixels"):
        load_pretrained(densenet, image_size=8)


def test_weights_of_another_backbone(tmp_path):
    state = checkpoint.model_state(official(True))
    path = save(tmp_path / "c.pth", state)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"arch 'resnet50': missing layer1\.0\.conv3.weight.*; and"
    ):
        load_pretrained(path, arch="resnet50")
    with pytest.raises(ValueError, match="arch 'resnet19' is unknown"):
        load_pretrained(path, arch="resnet19")
    path = save(tmp_path / "d.pth", state | {"module.encoder_q.extra": torch.zeros(1)})
    with pytest.raises(checkpoint.CheckpointError, match=r"arch 'resnet18': unexpected extra$"):
        load_pretrained(path)
    del state["module.encoder_q.bn1.running_var"]
    with pytest.raises(checkpoint.CheckpointError, match=r"arch 'resnet18': missing bn1.running_var$"):
        load_pretrained(save(tmp_path / "e.pth", state))
    with pytest.raises(checkpoint.CheckpointError, match="does not name its arch, got None"):
        load_pretrained(save(tmp_path / "f.pth", state, arch=None))


def test_files_without_a_pretrained_encoder(tmp_path):
    error = checkpoint.CheckpointError
    classifier = {"module." + n: v for n, v in models.resnet18().state_dict().items()}
    with pytest.raises(error, match=r"holds a classifier \(names such as conv1.weight.*give the pretrained"):
        load_pretrained(save(tmp_path / "linear.pth", classifier))
    with pytest.raises(
        error, match=r"no encoder that is known .* encoder_q\.\* or base_encoder\.\*, got net.w"
    ):
        load_pretrained(save(tmp_path / "net.pth", {"net.w": torch.zeros(1)}))
    with pytest.raises(error, match="must hold tensors by name under state_dict"):
        load_pretrained(save(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(error, match=r"another version: its moco_fast lacks 'config'"):
        load_pretrained(save(tmp_path / "old.pth", official(False).state_dict(), moco_fast={"step": 1}))
    torch.save(models.resnet18().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        error, match=r"bare.pth lacks state_dict; expected .* with the keys state_dict, it has conv1"
    ):
        load_pretrained(tmp_path / "bare.pth")
    data = (tmp_path / "bare.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(error, match=r"cut.pth is truncated or no checkpoint"):
        load_pretrained(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        load_pretrained(tmp_path / "absent")
