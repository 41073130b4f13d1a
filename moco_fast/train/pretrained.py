"""The backbone of a checkpoint, whoever wrote it, with all that evaluating it takes.

Two layouts are read, with or without what DDP and torch.compile put into names:

    this library's   run folder or checkpoint.pth; the config in it says what the encoder is and sees
    official MoCo    {epoch, arch, state_dict}: v1 and v2 with encoder_q.*, v3 with base_encoder.*;
                     ImageNet's statistics and 224 pixels, unless weights are made for another size

:mod:`moco_fast.convert` makes official ones of others.

Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks
from moco_fast.data.datasets import load_dataset
from moco_fast.data.images import Dataset, Log
from moco_fast.models.backbones import backbone as backbone_named
from moco_fast.models.heads import HEAD_NAMES, head_path, replace
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import IMAGENET_MEAN, IMAGENET_STD
from moco_fast.train.checkpoint import CheckpointError, shortened
from moco_fast.train.methods import METHODS, base_encoder

# Where methods keep the encoder that they are for; the first that a state dict has is taken.
ENCODERS = ("encoder_q", "base_encoder", "encoder", "teacher")
OFFICIAL = {"encoder_q": "moco", "base_encoder": "moco-v3"}  # method, by the encoder of official files
CANVAS = 2.0  # as in PretrainConfig, for files that do not say


@dataclass(frozen=True)
class Pretrained:
    """A pretrained backbone and what it was trained to see.

    Attributes:
        backbone: pooled features (N, width) of (N, channels, S, S). In eval mode, its head an Identity.
        width: F, features per image.
        arch: name of the backbone.
        method: what pretrained it, such as "moco".
        image_size: side of the views.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divided by.
        channels: of the images.
        canvas: side of the squares that a directory's images are reduced to, over ``image_size``.
        data: what it was trained on, as ``load_dataset`` takes it; None where the file does not say.
        fresh: builds the backbone anew, as it was before training: the same weights with every call.
        head: where its classifier was, as a dotted path.
        first_width: channels of the first stage, of "small_resnet".
    """

    backbone: nn.Module
    width: int
    arch: str
    method: str
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    channels: int
    canvas: float
    data: str | None
    fresh: Callable[[], nn.Module]
    head: str = "fc"
    first_width: int = 16


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    image_size: int | None = None,
) -> Pretrained:
    """Load the backbone of a checkpoint, strictly: only what follows the pooled features is left out.

    Args:
        path: run folder, checkpoint.pth, or an official MoCo file.
        arch: name of the backbone; default: what the file says.
        image_size: side of the views; default: that of the training, 224 for official files.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, without a pretrained encoder, or with weights of another backbone.
        ValueError: unknown ``arch``, or one that cannot take images of ``image_size``.
    """
    saved = checkpoints.read(path, keys=("state_dict",))
    own = saved.get("moco_fast")
    names = checkpoints.tensors(path, saved["state_dict"])
    prefix, weights = _encoder(path, names, tuple(OFFICIAL) if own is None else ENCODERS)
    facts = unrecorded(OFFICIAL[prefix], weights) if own is None else recorded(path, own)
    arch = arch or saved.get("arch")
    if not isinstance(arch, str):
        raise CheckpointError(f"{path} does not name its arch, got {arch!r}: give one, such as 'resnet50'")
    size = facts["image_size"] if image_size is None else checks.count("image_size", image_size)

    def build() -> tuple[nn.Module, str, int]:
        return blank(arch, facts | {"image_size": size})

    network, head, width = build()
    weights = {name: value for name, value in weights.items() if not name.startswith(head + ".")}
    if problems := checkpoints.mismatches(weights, network.state_dict()):
        raise CheckpointError(f"{path} does not hold the weights of arch {arch!r}: {problems}")
    network.load_state_dict(weights)
    try:
        with torch.no_grad():
            network(torch.zeros(1, facts["channels"], size, size))
    except Exception as error:  # whatever the backbone raises for a size it was not made for
        raise ValueError(f"arch {arch!r} cannot take images of image_size={size} pixels: {error}") from error
    return Pretrained(
        network, width, arch, facts["method"], size, facts["mean"], facts["std"], facts["channels"],
        facts["canvas"], facts["data"], lambda: build()[0], head, facts["first_width"],
    )  # fmt: skip


def dataset_for(pretrained: Pretrained, data: str | None, log: Log) -> Dataset:
    """Load a dataset that a backbone can be shown, by default the one it was trained on.

    Raises:
        FileNotFoundError: no such dataset.
        ValueError: neither ``data`` nor the checkpoint names one, or it has more channels than the backbone.
    """
    name = data or pretrained.data
    if name is None:
        raise ValueError("data must be given: the checkpoint does not say what it was trained on")
    dataset = load_dataset(name, canvas=round(pretrained.image_size * pretrained.canvas), log=log)
    if dataset.channels > pretrained.channels:
        raise ValueError(
            f"data {dataset.name!r} has {dataset.channels} channels, "
            f"the checkpoint's encoder takes {pretrained.channels}"
        )
    return dataset


def refuse_classifier(
    path: str | os.PathLike[str], names: Collection[str], expected: str, backbone: Collection[str] = ()
) -> None:
    """Raise CheckpointError if the names are those of a whole classifier, with its head.

    Args:
        path: for the message.
        names: of a state dict.
        expected: names of a pretrained checkpoint.
        backbone: names that are no head's, though they may begin like one, as "classifier.0" of a MobileNet.
    """
    if any(name.split(".")[0] in HEAD_NAMES and name not in backbone for name in names):
        raise CheckpointError(
            f"{path} holds a classifier (names such as {shortened(names)}), as a linear probe or supervised "
            f"training leaves it: give the pretrained checkpoint, with names {expected}"
        )


def _encoder(
    path: str | os.PathLike[str], names: Mapping[str, Tensor], prefixes: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the encoder's names in a state dict, and its entries without it."""
    for prefix in prefixes:
        inside = {n.removeprefix(prefix + "."): v for n, v in names.items() if n.startswith(prefix + ".")}
        if inside:
            return prefix, inside
    if any(name.startswith("backbone.") for name in names):
        raise CheckpointError(
            f"{path} has names of lightly or solo-learn ({shortened(names)}): moco-fast convert {path} OUT "
            "--to official makes a file of it that is read here"
        )
    expected = " or ".join(f"{prefix}.*" for prefix in prefixes)
    refuse_classifier(path, names, expected)
    raise CheckpointError(
        f"{path} holds no encoder that is known here: expected names {expected}, "
        f"got {shortened(names) or 'none'}"
    )


def recorded(path: str | os.PathLike[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this library says about its encoder.

    Read field by field: the configs of methods differ in what else they hold.
    """
    try:
        config = own["config"]
        row = METHODS.get(config.get("method"))
        return {
            "method": config.get("method", "moco"),
            "image_size": config["augment"]["image_size"],
            "first_width": config["width"],
            "outputs": config[row.outputs if row else "dim"],
            "seed": config["seed"],
            "canvas": config["canvas"],
            "data": config["data"],
            "mean": tuple(own["mean"]),
            "std": tuple(own["std"]),
            "channels": own["channels"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is of another version: its moco_fast lacks {error}") from error


def unrecorded(method: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What :func:`recorded` tells, of an encoder whose file does not: from the shapes of its weights.

    Grey images are taken to have the average statistics of ImageNet's channels.
    """
    first = next((value for value in weights.values() if value.ndim == 4), torch.empty(16, 3, 16, 16))
    channels = first.shape[1]
    mean, std = (
        IMAGENET_MEAN if channels == 3 else (sum(IMAGENET_MEAN) / 3,) * channels,
        IMAGENET_STD if channels == 3 else (sum(IMAGENET_STD) / 3,) * channels,
    )
    size = 224
    stem = [value for n, value in weights.items() if n.startswith("patch_embed.proj.") and value.ndim == 4]
    if stem and "pos_embed" in weights:
        patch = stem[0].shape[-1] if len(stem) == 1 else 2 ** (len(stem) - 1)  # a convolution halves
        size = patch * math.isqrt(weights["pos_embed"].shape[1] - 1)
    return {
        "method": method,
        "image_size": size,
        "first_width": first.shape[0],
        "outputs": 128,
        "seed": 0,
        "canvas": CANVAS,
        "data": None,
        "mean": mean,
        "std": std,
        "channels": channels,
    }


def factory(arch: str, facts: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """What makes the backbone of an encoder with these facts, as :func:`recorded` returns them.

    Raises:
        ValueError: unknown arch, or one that cannot take the channels.
    """
    return backbone_named(
        arch, width=facts["first_width"], in_channels=facts["channels"], image_size=facts["image_size"]
    )


def blank(arch: str, facts: Mapping[str, Any]) -> tuple[nn.Module, str, int]:
    """A backbone without its head, in eval mode, where that was, and the features it took.

    Built as the model of a run is, from the run's seed and with the run's head: the same numbers are drawn.

    Raises:
        ValueError: unknown arch, or one that cannot take the channels.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(facts["seed"])
        build = base_encoder(facts["method"], arch, factory(arch, facts))
        network = build(num_classes=facts["outputs"])
    head = head_path(network)
    linear = network.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    replace(network, head, nn.Identity())
    return network.eval(), head, linear.in_features
