"""Backbones by name: the small ResNet for small images, and everything torchvision has."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from moco_fast.extras import extra
from moco_fast.models.resnet import small_resnet

SMALL_RESNET = "small_resnet"


def backbone(arch: str, *, width: int, in_channels: int) -> Callable[..., nn.Module]:
    """Return what :class:`moco_fast.MoCo` takes as ``base_encoder``.

    Args:
        arch: "small_resnet", or the name of a torchvision classification model such as "resnet50".
        width: channels of the first stage, of "small_resnet" only.
        in_channels: channels of the images, 1 or 3; torchvision's models take 3.

    Raises:
        ValueError: unknown name (says what is close), or channels that the model cannot take.
    """
    if arch == SMALL_RESNET:
        return partial(small_resnet, width=width, in_channels=in_channels)
    models = extra("torchvision.models")
    names = [SMALL_RESNET, *models.list_models(module=models)]
    if arch not in names:
        close = ", ".join(difflib.get_close_matches(arch, names)) or "small_resnet, resnet18, resnet50"
        raise ValueError(f"arch {arch!r} is unknown; close are: {close}")
    if in_channels != 3:
        raise ValueError(f"arch {arch!r} takes images of 3 channels, got {in_channels}")
    return partial(models.get_model, arch)
