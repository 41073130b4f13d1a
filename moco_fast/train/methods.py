"""The methods that can be trained: a row each, naming the model, its options and how a step calls it.

To add one, write its model in ``moco_fast/models/`` and a row here (docs/adding-a-method.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from moco_fast import distributed
from moco_fast.models.backbones import VITS
from moco_fast.models.dino import DINO
from moco_fast.models.end_to_end import EndToEnd
from moco_fast.models.memory_bank import MemoryBank
from moco_fast.models.method import Method
from moco_fast.models.moco import MoCo
from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT, momentum_at
from moco_fast.models.simclr import SimCLR
from moco_fast.models.simsiam import SimSiam
from moco_fast.models.sup_moco import SupMoCo

Stats = dict[str, Tensor]
BaseEncoder = Callable[..., nn.Module]
Config = Any  # a PretrainConfig, whose options are set, not None, where the method uses them


class Views(NamedTuple):
    """What a step starts from."""

    first: Tensor  # (N, C, S, S)
    second: Tensor | None  # (N, C, S, S), unless the method takes one view
    indices: Tensor  # (N,) int64, rows of the training images
    labels: Tensor | None  # (N,) int64, where the method needs them


@dataclass(frozen=True)
class Facts:
    """What a model has to know of the training images."""

    images: int
    classes: int  # 0 where there are no labels


@dataclass(frozen=True)
class Row:
    """One method."""

    about: str
    """What it is, and where it was published."""
    build: Callable[[BaseEncoder, Config, Facts], Method]
    """From a base encoder and the config to the model."""
    step: Callable[[nn.Module, Views, Config, float], tuple[Tensor, Stats]]
    """Call the model (or what wraps it) on the views, at this part of the run, 0 to 1: loss and stats."""
    options: dict[str, Any]
    """Options of the config that it uses and not every method does, with the values that they have unless
    given; the others are refused."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """What of the default recipe, for small grey images, suits it better than MoCo's."""
    chance: Callable[[Config], float] | None = None
    """Loss of guessing."""
    keys_per_image: Callable[[Config], int] = lambda config: 0
    """Keys that an image adds to the queue."""
    undivided: str = ""
    """Why a batch must not be computed in parts, if so: what the method does that parts would change."""
    views: int = 2
    """Of every image."""
    needs_labels: bool = False
    outputs: str = "dim"
    """Option that says how many outputs its encoders are built with; what follows may replace their head."""
    resnet: dict[str, Any] = field(default_factory=dict)
    """What torchvision's ResNets are built with, as in the paper."""


def _moco(
    encoder: BaseEncoder, config: Config, facts: Facts, *, kind: Callable[..., MoCo] = MoCo, **options: Any
) -> MoCo:
    model = kind(
        encoder, config.dim, config.queue_size, config.momentum, config.temperature,
        bn_splits=max(1, config.bn_splits // distributed.world_size()), queue_sync=config.queue_sync,
        shuffle_bn=config.shuffle, symmetric=config.symmetric or False, **options,
    )  # fmt: skip
    model.accumulation_steps = config.accumulation
    return model


def _moco_step(model: nn.Module, views: Views, config: Config, progress: float) -> tuple[Tensor, Stats]:
    loss, stats = model(views.first, views.second, return_loss=True, return_stats=True)
    return loss, stats.means()


def _sup_moco(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return _moco(encoder, config, facts, kind=SupMoCo, mlp=True, classes=facts.classes)


def _sup_moco_step(model: nn.Module, views: Views, config: Config, progress: float) -> tuple[Tensor, Stats]:
    loss, stats = model(views.first, views.second, views.labels, return_stats=True)
    return loss, stats.means()


def _moco_v3(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    kind = MoCo_ViT if config.arch in VITS else MoCo_ResNet
    return kind(encoder, config.dim, config.mlp_dim, config.temperature)


def base_encoder(method: str, arch: str, encoder: BaseEncoder) -> BaseEncoder:
    """What a method builds its encoders with: the backbone of that name, initialised as in its paper."""
    row = METHODS.get(method)
    of_torchvision = arch.startswith(("resnet", "resnext", "wide_resnet"))
    return partial(encoder, **row.resnet) if row and of_torchvision else encoder


def _moco_v3_step(model: nn.Module, views: Views, config: Config, progress: float) -> tuple[Tensor, Stats]:
    m = momentum_at(progress, config.momentum)
    return model(views.first, views.second, m, return_stats=True)


def _two_views(model: nn.Module, views: Views, config: Config, progress: float) -> tuple[Tensor, Stats]:
    return model(views.first, views.second, return_stats=True)


def _end_to_end(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return EndToEnd(encoder, config.dim, config.temperature)


def _memory_bank(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return MemoryBank(
        encoder, facts.images, config.dim, config.queue_size, config.temperature, config.bank_momentum,
        loss="nce" if config.nce else "info_nce",
    )  # fmt: skip


def _memory_bank_step(
    model: nn.Module, views: Views, config: Config, progress: float
) -> tuple[Tensor, Stats]:
    return model(views.first, views.indices, return_stats=True)


def _simclr(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return SimCLR(encoder, config.dim, config.temperature)


def _simsiam(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return SimSiam(encoder, config.dim, config.pred_dim, config.stop_gradient)


def _dino(encoder: BaseEncoder, config: Config, facts: Facts) -> Method:
    return DINO(
        encoder, config.dim, config.prototypes, config.mlp_dim, config.temperature, config.teacher_temperature
    )


def _dino_step(model: nn.Module, views: Views, config: Config, progress: float) -> tuple[Tensor, Stats]:
    m = momentum_at(progress, config.momentum)
    return model(views.first, views.second, m, return_stats=True)


def _guess_among_queue(config: Config) -> float:
    return math.log(config.queue_size + 1) * (2 if config.symmetric else 1)


def _guess_in_bank(config: Config) -> float:
    drawn = config.queue_size
    return math.log(drawn + 1) + (drawn * math.log1p(1 / drawn) if config.nce else 0.0)


_QUEUE: dict[str, Any] = {
    "queue_size": 4096, "momentum": 0.99, "temperature": 0.2, "bn_splits": 1, "shuffle": True,
    "queue_sync": "global",
}  # fmt: skip

METHODS: dict[str, Row] = {
    "moco-v1": Row(
        "momentum contrast with a linear head; He et al. 2020",
        _moco,
        _moco_step,
        _QUEUE | {"temperature": 0.07, "symmetric": False},
        chance=_guess_among_queue,
        keys_per_image=lambda config: 2 if config.symmetric else 1,
    ),
    "moco-v2": Row(
        "with a projection MLP; Chen et al. 2020, Improved Baselines",
        partial(_moco, mlp=True),
        _moco_step,
        _QUEUE | {"symmetric": False},
        chance=_guess_among_queue,
        keys_per_image=lambda config: 2 if config.symmetric else 1,
    ),
    "moco-v3": Row(
        "keys of the batch, a predictor, both directions; Chen et al. 2021",
        _moco_v3,
        _moco_v3_step,
        {"momentum": 0.99, "temperature": 0.2, "mlp_dim": 512, "freeze_patch": False},
        chance=lambda config: 4 * config.temperature * math.log(config.batch_size),
        undivided="takes its negatives from the batch",
        outputs="mlp_dim",
        resnet={"zero_init_residual": True},
    ),
    "sup-moco": Row(
        "MoCo v2 whose positives are all keys of the same class; Khosla et al. 2020",
        _sup_moco,
        _sup_moco_step,
        _QUEUE,
        chance=_guess_among_queue,
        keys_per_image=lambda config: 1,
        needs_labels=True,
    ),
    "end-to-end": Row(
        "keys of the batch, with gradient to them; He et al. 2020, figure 2a",
        _end_to_end,
        _two_views,
        {"temperature": 0.07},
        chance=lambda config: math.log(config.batch_size),
        undivided="takes its negatives from the batch",
    ),
    "memory-bank": Row(
        "a row for every image, its average over the epochs; Wu et al. 2018",
        _memory_bank,
        _memory_bank_step,
        {"queue_size": 4096, "bank_momentum": 0.5, "temperature": 0.07, "nce": False},
        chance=_guess_in_bank,
        views=1,
    ),
    "simclr": Row(
        "every view against all others of the batch; Chen et al. 2020",
        _simclr,
        _two_views,
        {"temperature": 0.2},
        chance=lambda config: math.log(2 * config.batch_size - 1),
        undivided="takes its negatives from the batch",
    ),
    "simsiam": Row(
        "no negatives: a predictor and a stop-gradient; Chen and He 2021",
        _simsiam,
        _two_views,
        {"pred_dim": 128, "stop_gradient": True},
        {"dim": 512},
    ),
    "dino": Row(
        "a teacher's assignment to prototypes, centred and sharpened; Caron et al. 2021",
        _dino,
        _dino_step,
        {
            "momentum": 0.99, "temperature": 0.1, "teacher_temperature": 0.04, "mlp_dim": 512,
            "prototypes": 4096,
        },
        chance=lambda config: math.log(config.prototypes),
        undivided="moves its teacher and its center with every call",
    ),
}  # fmt: skip
