"""Recipes by name, with what they reach and who measured it: the table behind ``moco-fast presets``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moco_fast.data.augment import AugmentConfig
from moco_fast.train.config import PretrainConfig


@dataclass(frozen=True)
class Preset:
    """A recipe."""

    config: PretrainConfig
    about: str
    reached: str = "not measured"
    measured_by: str = ""


_FASHION_MNIST = PretrainConfig()

_IMAGENET_V1 = PretrainConfig(
    data="imagenet", method="moco-v1", epochs=200, batch_size=256, arch="resnet50", queue_size=65536,
    momentum=0.999, temperature=0.07, dim=128, lr=0.03, lr_batch_size=256, weight_decay=1e-4,
    warmup_epochs=0.0, schedule="step", milestones=(120, 160), bf16=True, workers=8, checkpoint_every=1000,
    augment=AugmentConfig(image_size=224, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur_p=0.0),
)  # fmt: skip
_IMAGENET_V2 = replace(
    _IMAGENET_V1, method="moco-v2", temperature=0.2, schedule="cosine", augment=AugmentConfig(image_size=224)
)

_HERE = "this library, two cores, one seed"
_V1_PAPER, _V2_PAPER = "He et al. 2020", "Chen et al. 2020"
_V3_AUTHORS, _NOTEBOOK = "the authors of MoCo v3", "the authors' CIFAR-10 notebook"

PRESETS: dict[str, Preset] = {
    "fashion-mnist": Preset(_FASHION_MNIST, "the default: minutes on two cores", "kNN 83.4 %", _HERE),
    "fashion-mnist-long": Preset(
        replace(_FASHION_MNIST, epochs=10), "the same for twice as many epochs", "kNN 83.7 %", _HERE
    ),
    "digits": Preset(
        replace(
            _FASHION_MNIST, data="digits", epochs=60, queue_size=1024, batch_size=128,
            augment=replace(_FASHION_MNIST.augment, image_size=8),
        ),
        "scikit-learn's 8x8 digits, where Fashion-MNIST cannot be had",
    ),
    "folder": Preset(
        replace(_FASHION_MNIST, data="images", augment=AugmentConfig(image_size=64)),
        "a directory of images: 64-pixel views, MoCo v2's augmentation",
    ),
    "moco-v1": Preset(_IMAGENET_V1, "ImageNet, 200 epochs", "linear 60.6 %", _V1_PAPER),
    "moco-v2": Preset(_IMAGENET_V2, "ImageNet, 200 epochs", "linear 67.5 %", _V2_PAPER),
    "moco-v2-800": Preset(
        replace(_IMAGENET_V2, epochs=800), "ImageNet, 800 epochs", "linear 71.1 %", _V2_PAPER
    ),
}  # fmt: skip

_OF_DATA = {
    "fashion-mnist": "fashion-mnist",
    "digits": "digits",
}


def preset_for(data: str) -> str:
    """The recipe that suits a dataset: one of its own, else the one for a directory of images."""
    return _OF_DATA.get(data, "folder")


def moved_to(config: PretrainConfig, preset: str) -> PretrainConfig:
    """``config`` with the values of another preset wherever it has those of its own."""
    own = PRESETS[preset_for(config.data)].config.with_method(config.method)
    changed = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != getattr(own, f.name)
    }
    return replace(PRESETS[preset].config.with_method(config.method), **changed)
