"""Recipes by name. docs/recipes.md says what each reaches and who measured it."""

from __future__ import annotations

from dataclasses import fields, replace

from moco_fast.data.augment import AugmentConfig
from moco_fast.train.config import PretrainConfig

_FASHION_MNIST = PretrainConfig()

_IMAGENET_V1 = PretrainConfig(
    data="imagenet", epochs=200, batch_size=256, arch="resnet50", queue_size=65536, momentum=0.999,
    temperature=0.07, dim=128, mlp=False, lr=0.03, lr_batch_size=256, schedule="step", milestones=(120, 160),
    weight_decay=1e-4,
    warmup_epochs=0.0,
    augment=AugmentConfig(image_size=224, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur_p=0.0),
    bf16=True, workers=8, checkpoint_every=1000,
)  # fmt: skip

PRESETS: dict[str, PretrainConfig] = {
    "fashion-mnist": _FASHION_MNIST,
    "fashion-mnist-long": replace(_FASHION_MNIST, epochs=10),
    "digits": replace(
        _FASHION_MNIST, data="digits", epochs=60, queue_size=1024, batch_size=128,
        augment=replace(_FASHION_MNIST.augment, image_size=8),
    ),
    "folder": replace(_FASHION_MNIST, data="images", augment=AugmentConfig(image_size=64)),
    "moco-v1": _IMAGENET_V1,
    "moco-v2": replace(
        _IMAGENET_V1, temperature=0.2, mlp=True, schedule="cosine", augment=AugmentConfig(image_size=224)
    ),
}  # fmt: skip


def preset_for(data: str) -> str:
    """The recipe that suits a dataset: one of its own name, else the one for a directory of images."""
    return data if data in ("fashion-mnist", "digits") else "folder"


def moved_to(config: PretrainConfig, preset: str) -> PretrainConfig:
    """``config`` with the values of another preset wherever it has those of its own."""
    own = PRESETS[preset_for(config.data)]
    changed = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != getattr(own, f.name)
    }
    return replace(PRESETS[preset], **changed)
