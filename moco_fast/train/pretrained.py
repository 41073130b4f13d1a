"""The backbone of a checkpoint, whoever wrote it, with all that evaluating it takes.

Two layouts are read, with or without DDP's ``module.``:

    this library's   run folder or checkpoint.pth; the config in it says what the encoder is and sees
    official MoCo    {epoch, arch, state_dict}: v1 and v2 with encoder_q.*, v3 with base_encoder.*;
                     ImageNet's statistics, 224 pixels, 3 channels

Tests: tests/test_pretrained.py.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks
from moco_fast.data.datasets import load_dataset
from moco_fast.data.images import Dataset, Log
from moco_fast.models.backbones import backbone as backbone_named
from moco_fast.models.heads import HEAD_NAMES, head_path
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import IMAGENET_MEAN, IMAGENET_STD
from moco_fast.train.checkpoint import CheckpointError

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
    prefix, weights = _encoder(path, saved["state_dict"], tuple(OFFICIAL) if own is None else ENCODERS)
    facts = _official(prefix) if own is None else _recorded(path, own)
    arch = arch or saved.get("arch")
    if not isinstance(arch, str):
        raise CheckpointError(f"{path} does not name its arch, got {arch!r}: give one, such as 'resnet50'")
    size = facts["image_size"] if image_size is None else checks.count("image_size", image_size)

    def build() -> tuple[nn.Module, str, int]:
        return _headless(_factory(arch, facts["first_width"], facts["channels"], size), facts)

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


def _encoder(
    path: str | os.PathLike[str], state: Any, prefixes: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the encoder's names in a state dict, and its entries without it."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold tensors by name under state_dict")
    names = {name.removeprefix(checkpoints.PREFIX): value for name, value in state.items()}
    for prefix in prefixes:
        inside = {n.removeprefix(prefix + "."): v for n, v in names.items() if n.startswith(prefix + ".")}
        if inside:
            return prefix, inside
    expected = " or ".join(f"{prefix}.*" for prefix in prefixes)
    shown = ", ".join(list(names)[:3]) or "none"
    if any(name.split(".")[0] in HEAD_NAMES for name in names):
        raise CheckpointError(
            f"{path} holds a classifier (names such as {shown}), as a linear probe or supervised training "
            f"leaves it: give the pretrained checkpoint, with names {expected}"
        )
    raise CheckpointError(
        f"{path} holds no encoder that is known here: expected names {expected}, got {shown}"
    )


def _recorded(path: str | os.PathLike[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this library says about its encoder.

    Read field by field: the configs of methods differ in what else they hold.
    """
    try:
        config = own["config"]
        return {
            "method": config.get("method", "moco"),
            "image_size": config["augment"]["image_size"],
            "first_width": config["width"],
            "dim": config["dim"],
            "seed": config["seed"],
            "canvas": config["canvas"],
            "data": config["data"],
            "mean": tuple(own["mean"]),
            "std": tuple(own["std"]),
            "channels": own["channels"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is of another version: its moco_fast lacks {error}") from error


def _official(prefix: str) -> dict[str, Any]:
    """What is known of official files without being in them."""
    return {
        "method": OFFICIAL[prefix],
        "image_size": 224,
        "first_width": 16,
        "dim": 128,
        "seed": 0,
        "canvas": CANVAS,
        "data": None,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "channels": 3,
    }


def _factory(arch: str, first_width: int, channels: int, image_size: int) -> Callable[..., nn.Module]:
    options: dict[str, Any] = {"width": first_width, "in_channels": channels}
    if "image_size" in inspect.signature(backbone_named).parameters:  # which vision transformers need
        options["image_size"] = image_size
    return backbone_named(arch, **options)


def _headless(factory: Callable[..., nn.Module], facts: Mapping[str, Any]) -> tuple[nn.Module, str, int]:
    """A backbone without its head, where that was, and the features it took.

    Built as the model of a run is, from the run's seed and with the run's head: the same numbers are drawn.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(facts["seed"])
        network = factory(num_classes=facts["dim"])
    head = head_path(network)
    linear = network.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    owner, _, name = head.rpartition(".")
    setattr(network.get_submodule(owner), name, nn.Identity())
    return network.eval(), head, linear.in_features
