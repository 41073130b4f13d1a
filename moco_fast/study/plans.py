"""The studies: a question each, and the runs that answer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moco_fast.data.augment import AugmentConfig
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS

NEVER = 10**9  # steps between measurements: a study measures at the end alone

Make = Callable[..., PretrainConfig]  # from a method and changes to the config of a run


@dataclass(frozen=True)
class Point:
    """One setting, to be run with every seed."""

    series: str
    """Line of the figure, or its label where there is no axis."""
    x: float | None
    """Place on the axis."""
    config: PretrainConfig


@dataclass(frozen=True)
class Study:
    """A question and the points that answer it."""

    question: str
    source: str
    axis: str | None
    """What x is; None where the points are compared side by side."""
    small: Callable[[], list[Point]]
    """Minutes a run on two cores: Fashion-MNIST, the small ResNet at width 8, one to six epochs."""
    full: Callable[[], list[Point]]
    """The published setting, for GPUs."""


def _small(method: str, **changes: Any) -> PretrainConfig:
    recipe = PRESETS["fashion-mnist"].config.with_method(method)
    shared: dict[str, Any] = {"width": 8, "epochs": 1, "warmup_epochs": 0.05, "knn_every": NEVER}
    return replace(recipe, **(shared | changes))


def _at_size(side: int) -> AugmentConfig:
    return replace(PRESETS["fashion-mnist"].config.augment, image_size=side)


def _published(preset: str, **changes: Any) -> PretrainConfig:
    return replace(PRESETS[preset].config, knn_every=NEVER, **changes)


def _imagenet(method: str, **changes: Any) -> PretrainConfig:
    """The recipe of MoCo v1 with another method, as He et al. 2020 compare them, section 4.1."""
    recipe = PRESETS["moco-v1"].config
    kept = {*METHODS[method].recipe, *({"temperature", "queue_size"} & METHODS[method].options.keys())}
    recipe = replace(recipe.with_method(method), **{name: getattr(recipe, name) for name in kept})
    return replace(recipe, knn_every=NEVER, **changes)


def _methods(make: Make) -> list[Point]:
    points = []
    for method, row in METHODS.items():
        points.append(Point(method, None, make(method)))
        for variant in ("symmetric", "nce"):
            if variant in row.options and method != "moco-v1":
                points.append(Point(f"{method}, {variant}", None, make(method, **{variant: True})))
    return points


def _methods_full() -> list[Point]:
    """Every method by the recipe that was published for it where there is a preset, else by MoCo v1's."""
    published = ("moco-v2", "moco-v3")
    return [
        replace(point, config=_published(point.series)) if point.series in published else point
        for point in _methods(_imagenet)
    ]


def _dictionary(make: Make, sizes: Sequence[int], batches: Sequence[int]) -> list[Point]:
    return [
        *(Point("MoCo", size, make("moco-v1", queue_size=size)) for size in sizes),
        *(Point("memory bank", size, make("memory-bank", queue_size=size)) for size in sizes),
        # A batch of N has N - 1 negatives, and a learning rate to suit.
        *(Point("end-to-end", batch - 1, make("end-to-end", batch_size=batch)) for batch in batches),
    ]


def _over(make: Make, name: str, option: str, values: Sequence[float], **fixed: Any) -> list[Point]:
    return [Point(name, value, make(name, **{option: value}, **fixed)) for value in values]


def _shuffle(make: Make, name: str, splits: int, **fixed: Any) -> list[Point]:
    """One device in place of ``splits``, whose batch norms see a part each."""
    settings: dict[str, dict[str, Any]] = {
        f"BN over {splits} parts, shuffled": {"bn_splits": splits},
        f"BN over {splits} parts, not shuffled": {"bn_splits": splits, "shuffle": False},
        "BN over the whole batch": {"bn_splits": 1},
    }
    return [Point(label, None, make(name, **changes, **fixed)) for label, changes in settings.items()]


STUDIES: dict[str, Study] = {
    "methods": Study(
        "How do the methods compare on one budget?",
        "each method's paper",
        None,
        # Two epochs: before the second the rows of a memory bank are those drawn at random.
        lambda: _methods(partial(_small, epochs=2)),
        _methods_full,
    ),
    "dictionary": Study(
        "How does accuracy depend on the number of negatives, and on where they come from?",
        "He et al. 2020, figure 3",
        "negatives",
        lambda: _dictionary(_small, (128, 512, 2048, 8192), (64, 128, 256, 512)),
        lambda: _dictionary(_imagenet, (256, 512, 1024, 4096, 16384, 65536), (256, 512, 1024)),
    ),
    "momentum": Study(
        "How slowly must the key encoder move?",
        "He et al. 2020, section 4.1, ablation of momentum",
        "momentum m",
        # A queue of 128 batches, so that keys of many encoders meet, as 256 do in the paper's.
        lambda: _over(_small, "moco-v2", "momentum", (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999), queue_size=16384),
        lambda: _over(_imagenet, "moco-v1", "momentum", (0.0, 0.9, 0.99, 0.999, 0.9999), queue_size=4096),
    ),
    "temperature": Study(
        "How sharp should the softmax be?",
        "Chen et al. 2020, Improved Baselines, section 3",
        "temperature T",
        lambda: _over(_small, "moco-v2", "temperature", (0.03, 0.07, 0.1, 0.2, 0.5, 1.0)),
        lambda: _over(_published, "moco-v2", "temperature", (0.07, 0.1, 0.2, 0.3, 0.4, 0.5)),
    ),
    "shuffle": Study(
        "Does shuffling the keys' batch keep batch norm from giving the positive away?",
        "He et al. 2020, section 3.3 and appendix A.9",
        None,
        # Half the side buys the steps that it takes to learn to cheat.
        lambda: _shuffle(_small, "moco-v2", 16, epochs=6, augment=_at_size(14)),
        lambda: _shuffle(_published, "cifar10-200", 8),
    ),
    "batch-size": Study(
        "How large a batch does MoCo v3 need?",
        "Chen et al. 2021, section 4.1",
        "batch size",
        lambda: _over(_small, "moco-v3", "batch_size", (32, 64, 128, 256, 512)),
        lambda: _over(_published, "moco-v3", "batch_size", (512, 1024, 2048, 4096)),
    ),
}
