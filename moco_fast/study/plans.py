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
    """ImageNet or CIFAR-10 by published recipes, for GPUs; docs/studies.md says by which."""


def _small(method: str, **changes: Any) -> PretrainConfig:
    recipe = PRESETS["fashion-mnist"].config.with_method(method)
    shared: dict[str, Any] = {"width": 8, "epochs": 1, "warmup_epochs": 0.05, "knn_every": NEVER}
    return replace(recipe, **(shared | changes))


def _at_size(side: int) -> AugmentConfig:
    return replace(PRESETS["fashion-mnist"].config.augment, image_size=side)


def _published(preset: str, **changes: Any) -> PretrainConfig:
    return replace(PRESETS[preset].config, knn_every=NEVER, **changes)


def _imagenet(method: str, **changes: Any) -> PretrainConfig:
    """The recipe of MoCo v1 with another method, as He et al. 2020 compare them, section 4.1.

    Their end-to-end mechanism shuffles too (appendix A.9); here it takes the statistics of all processes.
    """
    recipe = PRESETS["moco-v1"].config
    kept = {*METHODS[method].recipe, *({"temperature", "queue_size"} & METHODS[method].options.keys())}
    recipe = replace(recipe.with_method(method), **{name: getattr(recipe, name) for name in kept})
    return replace(recipe, knn_every=NEVER, sync_bn=method == "end-to-end", **changes)


def _methods() -> list[Point]:
    # Two epochs: before the second the rows of a memory bank are those drawn at random.
    small = partial(_small, epochs=2)
    points = []
    for method, row in METHODS.items():
        points.append(Point(method, None, small(method)))
        for variant in ("symmetric", "nce"):
            if variant in row.options and method != "moco-v1":
                points.append(Point(f"{method}, {variant}", None, small(method, **{variant: True})))
    return points


def _methods_full() -> list[Point]:
    """Every method by its own paper but for the epochs: 100 of ImageNet each, with a ResNet-50.

    Sources: He et al. 2020, also for its other mechanisms, section 4.1; Chen et al. 2020, Improved Baselines;
    Chen et al. 2021, the authors' recipe for 100 epochs; Khosla et al. 2020, with a memory of 8192; Wu et al.
    2018; Chen et al. 2020, SimCLR, section 2.2; Chen and He 2021, section 4; Caron et al. 2021, the authors'
    command for ResNet-50, without local crops.
    """
    v1 = partial(_imagenet, epochs=100, milestones=(60, 80))
    v2 = partial(_published, "moco-v2", epochs=100)
    v3 = _published("moco-v3", epochs=100)
    configs = {
        "moco-v1": v1("moco-v1"),
        "moco-v2": v2(),
        "moco-v2, symmetric": v2(symmetric=True),
        "moco-v3": v3,
        "sup-moco": replace(v2().with_method("sup-moco"), queue_size=8192, temperature=0.1),
        "end-to-end": v1("end-to-end"),
        "memory-bank": v1("memory-bank"),
        "memory-bank, nce": v1("memory-bank", nce=True, queue_size=4096),
        # Batch 4096 and LARS with ten epochs of warm-up, as in MoCo v3, which has them from here.
        "simclr": replace(
            v3.with_method("simclr"), dim=128, temperature=0.1, lr=0.3, augment_second=None,
            augment=AugmentConfig(image_size=224, crop_scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2)),
        ),
        # MoCo v2's views.
        "simsiam": replace(
            v2().with_method("simsiam"), dim=2048, pred_dim=512, batch_size=512, lr=0.05, sync_bn=True
        ),
        # MoCo v3's views, which are BYOL's, in wider crops.
        "dino": replace(
            v3.with_method("dino"), dim=256, mlp_dim=2048, prototypes=65536, momentum=0.996, temperature=0.1,
            teacher_temperature=0.04, batch_size=512, optimizer="sgd", lr=0.03, weight_decay=1e-4,
            augment=replace(v3.augment, crop_scale=(0.14, 1.0)),
            augment_second=replace(v3.augment_second or v3.augment, crop_scale=(0.14, 1.0)),
        ),
    }  # fmt: skip
    return [Point(name, None, config) for name, config in configs.items()]


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
        _methods,
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
