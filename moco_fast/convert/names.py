"""What a ResNet's layers are called elsewhere, and which ResNet weights are of.

torchvision, timm    conv1 bn1 layer1.0.conv1 layer1.0.bn1 layer1.0.downsample.0 layer1.0.downsample.1
detectron2           stem.conv1 stem.conv1.norm res2.0.conv1 res2.0.conv1.norm res2.0.shortcut
                     res2.0.shortcut.norm
lightly's examples   0 1 4.0.conv1 4.0.bn1 ...: the index of torchvision's child in a Sequential
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moco_fast.models.backbones import CIFAR_RESNET, backbone

CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
ALL_RESNETS = (*RESNETS, CIFAR_RESNET)


def recognised(weights: Mapping[str, Tensor]) -> str | None:
    """The ResNet that the weights are of, told by names and shapes; its classifier may be missing."""
    first = weights.get("conv1.weight")
    if first is None or first.ndim != 4:
        return None
    for arch in (CIFAR_RESNET,) if first.shape[-1] == 3 else RESNETS:
        channels = first.shape[1] if arch == CIFAR_RESNET else 3
        with torch.device("meta"):
            wanted = backbone(arch, in_channels=channels)(num_classes=1).state_dict()
        if _shapes(weights) == _shapes(wanted):
            return arch
    return None


def indexed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of lightly's examples."""
    return {_renamed(name, CHILDREN): value for name, value in weights.items()}


def named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`indexed`; other names stay."""
    if not all(name.partition(".")[0] in CHILDREN.values() for name in weights):
        return dict(weights)
    children = {index: child for child, index in CHILDREN.items()}
    return {_renamed(name, children): value for name, value in weights.items()}


def detectron2_name(name: str) -> str:
    """detectron2's name of a ResNet's weight."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


def _renamed(name: str, children: Mapping[str, str]) -> str:
    child, dot, rest = name.partition(".")
    return children[child] + dot + rest


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if not name.startswith("fc.")}
