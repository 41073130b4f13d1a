"""Backbones by name: those made for small images or for MoCo v3, and everything torchvision has."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from moco_fast.extras import extra
from moco_fast.models import vits
from moco_fast.models.resnet import small_resnet

SMALL_RESNET = "small_resnet"
CIFAR_RESNET = "cifar_resnet18"
VITS: dict[str, Callable[..., nn.Module]] = {
    "small_vit": vits.small_vit,
    "vit_small": vits.vit_small,
    "vit_base": vits.vit_base,
    "vit_conv_small": vits.vit_conv_small,
    "vit_conv_base": vits.vit_conv_base,
}
ANY_CHANNELS = (SMALL_RESNET, CIFAR_RESNET, *VITS)  # torchvision's take 3


def backbone(
    arch: str, *, width: int = 16, in_channels: int = 3, image_size: int | None = None
) -> Callable[..., nn.Module]:
    """Return what :class:`moco_fast.MoCo` takes as ``base_encoder``.

    Args:
        arch: "small_resnet", "cifar_resnet18", a transformer of :mod:`moco_fast.models.vits` such as
            "vit_small", or the name of a torchvision classification model such as "resnet50".
        width: channels of the first stage, of "small_resnet" only.
        in_channels: channels of the images, 1 or 3; torchvision's models take 3.
        image_size: pixels on a side, for transformers, which are made for one size; None: 28 for
            "small_vit", 224 for the others.

    Raises:
        ValueError: unknown name (says what is close), or channels that the model cannot take.
    """
    if arch == SMALL_RESNET:
        return partial(small_resnet, width=width, in_channels=in_channels)
    if arch == CIFAR_RESNET:
        return partial(cifar_resnet18, in_channels=in_channels)
    if arch in VITS:
        sizes = {} if image_size is None else {"img_size": image_size}
        return partial(VITS[arch], in_chans=in_channels, **sizes)
    models = extra("torchvision.models")
    names = [*ANY_CHANNELS, *models.list_models(module=models)]
    if arch not in names:
        close = ", ".join(difflib.get_close_matches(arch, names)) or "small_resnet, resnet18, resnet50"
        raise ValueError(f"arch {arch!r} is unknown; close are: {close}")
    if in_channels != 3:
        raise ValueError(f"arch {arch!r} takes images of 3 channels, got {in_channels}")
    return partial(models.get_model, arch)


def cifar_resnet18(num_classes: int = 128, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 for 32-pixel images: a 3x3 convolution of stride 1 first, and no max-pool.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, whose CIFAR networks
    begin so.
    """
    model = extra("torchvision.models").resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
