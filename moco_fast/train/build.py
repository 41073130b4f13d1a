"""From a config and a dataset to the model that is trained."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed
from moco_fast.data.images import Dataset
from moco_fast.models.backbones import ANY_CHANNELS, VITS, backbone
from moco_fast.models.method import Method
from moco_fast.optim import LARS, SGD, AdamW
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import METHODS, Facts, base_encoder
from moco_fast.train.processes import local_rank

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_model(config: PretrainConfig, channels: int, facts: Facts) -> Method:
    """The model of a recipe, freshly initialised from ``config.seed``.

    Raises:
        ValueError: the architecture cannot take images of the recipe's size, or the method needs labels.
    """
    row = METHODS[config.method]
    if row.needs_labels and not facts.classes:
        raise ValueError(
            f"method {config.method!r} needs class labels, and the images have none (one sub-folder per "
            "class gives them)"
        )
    torch.manual_seed(config.seed)
    size = config.augment.image_size
    encoder = backbone(config.arch, width=config.width, in_channels=channels, image_size=size)
    encoder = base_encoder(config.method, config.arch, encoder)
    if config.freeze_patch and config.arch in VITS:
        encoder = partial(encoder, stop_grad_conv1=True)
    model = row.build(encoder, config, facts)
    model.eval()
    for view in {size, (config.augment_second or config.augment).image_size}:
        try:
            model.features(torch.zeros(1, channels, view, view))
        except Exception as error:  # whatever the backbone raises for a size it was not made for
            raise ValueError(
                f"arch {config.arch!r} cannot take images of image_size={view} pixels: {error}"
            ) from error
    return model.train()


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe, over all parameters in the order of the state dict."""
    if config.optimizer == "adamw":
        return AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    kind: Callable[..., torch.optim.Optimizer] = LARS if config.optimizer == "lars" else SGD
    return kind(model.parameters(), config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay)


def check_processes(config: PretrainConfig, device: torch.device) -> None:
    """Raise ValueError for a recipe that cannot be shared out among the processes there are."""
    processes = distributed.world_size()
    if config.batch_size % (processes * config.accumulation):
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {processes * config.accumulation}, the "
            f"{processes} processes times accumulation={config.accumulation}"
        )
    if config.bn_splits is not None and config.bn_splits > 1 and config.bn_splits % processes:
        raise ValueError(
            f"bn_splits={config.bn_splits} must be 1 or a multiple of the {processes} processes, each of "
            "which has statistics of its own"
        )
    if config.sync_bn and processes > 1 and device.type != "cuda":
        raise ValueError(f"sync_bn needs GPUs, PyTorch has no synchronised batch norm on {device}")


def replicated(model: Method, config: PretrainConfig, device: torch.device) -> nn.Module:
    """The model as it is called in training: one of several replicas under DistributedDataParallel."""
    if config.compile:  # in place, so that names in the state dict stay
        for network in model.children():
            network.compile()
    return data_parallel(model, device)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself, or with several processes a replica whose gradients are averaged over them.

    On a GPU cuDNN then measures, once per shape, which of its convolutions is fastest: steps have one shape.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if distributed.world_size() == 1:
        return model
    # Statistics stay each process's own, to be averaged when they are used. The option was renamed.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "device_ids": [device] if device.type == "cuda" else None}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def choose_device(name: str) -> torch.device:
    """The device of "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"; a GPU becomes the current one.

    Random state is saved, restored and forked of the current GPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        # A group that is not torchrun's: whoever made it has chosen a device.
        name = f"cuda:{local_rank() if 'LOCAL_RANK' in os.environ else torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name, or no usable GPU
        reason = str(error).splitlines()[0].partition(". ")[0][:160]  # torch lists all that it knows
        raise ValueError(
            f"device {name!r} cannot be used: {reason}; expected auto, cpu, cuda or cuda:1"
        ) from error
    return device


def input_channels(config: PretrainConfig, dataset: Dataset) -> int:
    """Channels that the encoder sees: the dataset's, but torchvision's models always take three."""
    return dataset.channels if config.arch in ANY_CHANNELS else 3


def fit_to_dataset(config: PretrainConfig, dataset: Dataset, log: Callable[[str], object]) -> PretrainConfig:
    """Adapt a recipe to a dataset too small for it, saying so: a fallback to 1,437 digits must still train.

    A queue beyond half the images would hold keys of the very images in the batch as negatives,
    many times over; a batch has to fit into the queue.
    """
    count = len(dataset.train)
    keys = METHODS[config.method].keys_per_image(config)
    fits = max(2, count // 2)
    changes: dict[str, Any] = {"batch_size": min(config.batch_size, fits)}
    if keys:
        assert config.queue_size is not None
        changes["queue_size"] = min(config.queue_size, fits)
        changes["batch_size"] = min(config.batch_size, changes["queue_size"] // keys)
    splits = config.bn_splits or 1
    shares = math.lcm(splits, distributed.world_size()) * config.accumulation
    changes["batch_size"] -= changes["batch_size"] % shares
    if changes["batch_size"] == 0:
        wanted = {
            "processes": distributed.world_size(),
            "bn_splits": splits,
            "accumulation": config.accumulation,
        }
        reasons = ", ".join(f"{name}={number}" for name, number in wanted.items() if number > 1)
        raise ValueError(f"a batch of at most {fits} images cannot be cut into {shares} shares ({reasons})")
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    if not changes:
        return config
    said = ", ".join(f"{name} {getattr(config, name)} -> {value}" for name, value in changes.items())
    log(f"{dataset.name} has {count:,} training images: {said}.")
    return replace(config, **changes)


def channel_statistics(dataset: Dataset, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that views are normalised with: ImageNet's, or a grey dataset's own."""
    if dataset.channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    sample = torch.arange(min(len(dataset.train), 10_000))
    pixels = dataset.train.images.fetch(sample).images.float() / 255
    return [pixels.mean().item()] * channels, [pixels.std().item()] * channels
