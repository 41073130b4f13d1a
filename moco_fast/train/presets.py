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
    augment=AugmentConfig(
        image_size=224, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True, blur_p=0.0
    ),
)  # fmt: skip
_IMAGENET_V2 = replace(
    _IMAGENET_V1, method="moco-v2", temperature=0.2, schedule="cosine", augment=AugmentConfig(image_size=224)
)

_V3_VIEW = AugmentConfig(image_size=224, jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)
_V3 = replace(
    _IMAGENET_V2.with_method("moco-v3"), epochs=100, batch_size=4096, dim=256, mlp_dim=4096, momentum=0.99,
    temperature=1.0, optimizer="lars", lr=0.6, weight_decay=1e-6, warmup_epochs=10, sync_bn=True,
    augment=_V3_VIEW, augment_second=replace(_V3_VIEW, blur_p=0.1, solarize_p=0.2),
)  # fmt: skip
_V3_VIT = replace(
    _V3, arch="vit_small", epochs=300, temperature=0.2, optimizer="adamw", lr=1.5e-4, weight_decay=0.1,
    warmup_epochs=40, freeze_patch=True,
    augment=replace(_V3_VIEW, crop_scale=(0.08, 1.0)),
    augment_second=replace(_V3_VIEW, crop_scale=(0.08, 1.0), blur_p=0.1, solarize_p=0.2),
)  # fmt: skip

_CIFAR10 = replace(
    _IMAGENET_V2, method="moco-v1", data="cifar10", arch="cifar_resnet18", batch_size=512, queue_size=4096,
    momentum=0.99, temperature=0.1, bn_splits=8, lr=0.06, lr_batch_size=512, weight_decay=5e-4, knn_k=200,
    knn_bank=50_000, augment=AugmentConfig(image_size=32, crop_scale=(0.08, 1.0), blur_p=0.0), bf16=False,
)  # fmt: skip
_CIFAR10_SYMMETRIC = replace(_CIFAR10, symmetric=True)

# Its loss is the mean of both directions, this library's their sum: half the rate and twice the decay.
_IMAGENET_100 = replace(
    _IMAGENET_V2, data="imagenet100", symmetric=True, arch="resnet18", temperature=0.07, lr=0.015,
    weight_decay=2e-4, augment=AugmentConfig(image_size=224, crop_scale=(0.08, 1.0)), knn_bank=130_000,
)  # fmt: skip

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
    "moco-v3": Preset(_V3, "ImageNet, ResNet-50, 100 epochs", "linear 68.9 %", _V3_AUTHORS),
    "moco-v3-300": Preset(
        replace(_V3, epochs=300, lr=0.3), "ImageNet, ResNet-50, 300 epochs", "linear 72.8 %", _V3_AUTHORS
    ),
    "moco-v3-1000": Preset(
        replace(_V3, epochs=1000, lr=0.3, weight_decay=1.5e-6, momentum=0.996),
        "ImageNet, ResNet-50, 1000 epochs", "linear 74.6 %", _V3_AUTHORS,
    ),
    "moco-v3-vit-s": Preset(
        _V3_VIT, "ImageNet, ViT-S, 300 epochs", "linear 73.2 %, fine-tuned 81.4 %", _V3_AUTHORS
    ),
    "moco-v3-vit-b": Preset(
        replace(_V3_VIT, arch="vit_base"),
        "ImageNet, ViT-B, 300 epochs", "linear 76.7 %, fine-tuned 83.2 %", _V3_AUTHORS,
    ),
    **{
        f"cifar10-{epochs}": Preset(
            replace(_CIFAR10, epochs=epochs), f"CIFAR-10, {epochs} epochs", f"kNN {reached} %", _NOTEBOOK
        )
        for epochs, reached in ((200, 82.6), (400, 86.3), (800, 88.7))
    },
    **{
        f"cifar10-symmetric-{epochs}": Preset(
            replace(_CIFAR10_SYMMETRIC, epochs=epochs),
            f"CIFAR-10, symmetric, {epochs} epochs", f"kNN {reached} %", _NOTEBOOK,
        )
        for epochs, reached in ((200, 85.3), (400, 88.5), (800, 89.7))
    },
    "imagenet100": Preset(
        _IMAGENET_100, "ImageNet-100, ResNet-18, symmetric, 200 epochs",
        "kNN 56.0 %, 1314 min, 13.1 GB", "lightly's benchmark",
    ),
}  # fmt: skip

_OF_DATA = {
    "fashion-mnist": "fashion-mnist",
    "digits": "digits",
    "cifar10": "cifar10-200",
    "cifar100": "cifar10-200",
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
