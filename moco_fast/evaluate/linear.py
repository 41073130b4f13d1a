"""Linear classification of frozen features: MoCo's protocol, for many learning rates at once.

SGD with momentum and a step schedule, He et al. 2020, "Momentum Contrast", section 4.1.

Every head has a twin that never sees the held-out part of the training images; the learning rate is chosen by
the twins' accuracy there, never by the test images, and what is reported was trained on all training images.

Tests: tests/test_linear.py, against scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moco_fast import checks
from moco_fast.data.augment import AugmentConfig, random_view
from moco_fast.data.fraction import turns
from moco_fast.data.images import Dataset, ImageSet
from moco_fast.data.loader import BatchLoader
from moco_fast.evaluate.features import View, features_of, need_labels
from moco_fast.evaluate.frozen import check_unmoved, fingerprint
from moco_fast.evaluate.heads import Heads
from moco_fast.evaluate.knn import TOP

HELD_OUT = 10  # one in so many training images of every class chooses the learning rate
SMALL = 1 << 22  # multiplications of a matrix product that threads take longer to share than to compute
CROP_SCALE = (0.08, 1.0)  # of random resized crops, as for supervised training on ImageNet

# (batch of features (B, F), their labels (B,), their rows among the training images (B,)) of an epoch
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor, Tensor]]]


@dataclass(frozen=True)
class LinearConfig:
    """The protocol; the defaults are MoCo's, but for several learning rates in place of 30.

    Raises:
        TypeError, ValueError: a value out of range, named.
    """

    epochs: int = 100
    """Passes over the training images."""
    lr: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 30.0)
    """Learning rates, a classifier each; they are trained side by side."""
    batch_size: int = 256
    """Images per step."""
    schedule: tuple[int, ...] | None = None
    """Epochs at which the learning rate is divided by ten; None: at 60 % and 80 % of all."""
    weight_decay: float = 0.0
    """L2 penalty on weight and bias."""
    momentum: float = 0.9
    """Momentum of SGD."""
    normalize: bool = False
    """Give every feature mean 0 and variance 1 over the training images first: one learning rate then suits
    features of any scale."""
    augment: bool = False
    """Learn from a random resized crop of every image, flipped or not, in every epoch, through the backbone;
    else from the features of central squares, extracted once."""
    seed: int = 0
    """Seed of the classifiers, the order of images and the crops."""

    def __post_init__(self) -> None:
        checks.count("epochs", self.epochs)
        checks.count("batch_size", self.batch_size)
        if not self.lr or len(set(self.lr)) < len(self.lr):
            raise ValueError(f"lr must hold one or several different learning rates, got {self.lr}")
        for lr in self.lr:
            if checks.not_negative("lr", lr) == 0:
                raise ValueError(f"lr must be above 0, got {lr}")
        for epoch in self.schedule or ():
            checks.count("schedule", epoch)
        checks.not_negative("weight_decay", self.weight_decay)
        checks.fraction("momentum", self.momentum)
        checks.seed(self.seed)

    def factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch, counted from 0."""
        steps = self.schedule
        if steps is None:
            steps = (math.ceil(0.6 * self.epochs), math.ceil(0.8 * self.epochs))
        return 0.1 ** sum(epoch >= step for step in steps)


@dataclass(frozen=True)
class HeadResult:
    """How one learning rate did.

    Attributes:
        lr: the learning rate.
        held_out: accuracy of its twin on held-out training images; None with one learning rate alone.
        acc1: accuracy on the test images.
        acc5: share of test images whose class is among the five highest; 1 with up to five classes.
        diverged: its weights, or its twin's, are not finite: accuracies mean nothing.
    """

    lr: float
    held_out: float | None
    acc1: float
    acc5: float
    diverged: bool


@dataclass(frozen=True)
class LinearResult:
    """Outcome of a linear evaluation.

    Attributes:
        heads: results by learning rate, in the order given.
        chosen: index of the head with the highest held-out accuracy; of equals the smallest learning rate.
        weight: of the chosen head on features as the backbone returns them, (C, F).
        bias: (C,).
        classes: of the test images, the five highest of the chosen head, (M, 5) or (M, C).
        never_held_out: classes with one training image, which is kept to learn from.
    """

    heads: tuple[HeadResult, ...]
    chosen: int
    weight: Tensor
    bias: Tensor
    classes: Tensor
    never_held_out: tuple[int, ...]

    @property
    def best(self) -> HeadResult:
        """Result of the chosen head."""
        return self.heads[self.chosen]


def evaluate_linear(
    network: nn.Module,  # (B, C, S, S) -> (B, F)
    dataset: Dataset,
    view: View,
    config: LinearConfig,
    on_epoch: Callable[[int], object] = lambda epoch: None,
) -> LinearResult:
    """Accuracy of linear classifiers on the features of a frozen network.

    Args:
        network: is put in eval mode and must not change.
        dataset: with labels on both halves; the test half chooses nothing.
        view: what the network is shown.
        config: the protocol.
        on_epoch: called with the number of finished epochs.

    Raises:
        ValueError: no labels, fewer than two classes, several learning rates but nothing to hold out,
            features that are not finite, or every head diverged.
        BackboneMovedError: parameters or buffers of the network changed.
    """
    need_labels(dataset)
    assert dataset.test is not None and dataset.test.labels is not None and dataset.train.labels is not None
    before = fingerprint(network)
    network.eval()
    train, test = (features_of(network, s, torch.arange(len(s)), view) for s in (dataset.train, dataset.test))
    labels, test_labels = (s.labels.to(train.device) for s in (dataset.train, dataset.test))  # type: ignore[union-attr]
    batches = None
    if config.augment:
        batches = augmented_batches(network, dataset.train, labels, view, config)
    result = train_heads(
        train, labels, test, test_labels, len(dataset.class_names), config, batches, on_epoch
    )
    check_unmoved(before, network)
    return result


def train_heads(
    train: Tensor,  # (N, F)
    labels: Tensor,  # (N,) integers
    test: Tensor,  # (M, F)
    test_labels: Tensor,  # (M,) integers
    classes: int,
    config: LinearConfig,
    batches: Batches | None = None,
    on_epoch: Callable[[int], object] = lambda epoch: None,
) -> LinearResult:
    """Train all heads on features, and choose one.

    Args:
        train: features of the training images, of which the held-out ones choose.
        labels: their classes.
        test: features of the test images, which are only reported on.
        test_labels: their classes.
        classes: number of classes.
        config: the protocol.
        batches: what to train on instead of ``train``, by epoch.
        on_epoch: called with the number of finished epochs.

    Raises:
        ValueError: as for :func:`evaluate_linear`.
    """
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    checks.finite(train=train, test=test)
    for name, values in (("labels", labels), ("test_labels", test_labels)):
        checks.in_range(name, values, classes, wait=True)
    sweep = len(config.lr) > 1
    held_out, single = hold_out(labels, config.seed)
    if sweep and not held_out.any():
        raise ValueError(
            f"no class has two training images, so none can be held out to choose between "
            f"lr={config.lr}: give one learning rate"
        )
    scaler = Scaler.of(train) if config.normalize else Scaler.identity(train)
    # The heads that count, then their twins, which do not see what is held out.
    heads = Heads(
        train.shape[1], classes, config.lr * (2 if sweep else 1), weight_decay=config.weight_decay,
        momentum=config.momentum, seed=config.seed, like=train,
    )  # fmt: skip
    seen = torch.ones(2 if sweep else 1, len(train), dtype=train.dtype, device=train.device)
    seen[1:, held_out] = 0
    cached = batches is None
    if batches is None:
        batches = cached_batches(train, labels, config)
    alone = cached and train.device.type == "cpu" and heads.weight.numel() * config.batch_size < SMALL
    with _one_thread() if alone else nullcontext():
        for epoch in range(config.epochs):
            factor = config.factor(epoch)
            for x, y, rows in batches(epoch):
                share = seen[:, rows]
                share /= share.sum(1, keepdim=True).clamp(min=1)
                heads.step(scaler(x), y, share, factor)
            on_epoch(epoch + 1)

    # what came of it
    finite = heads.weight.view(heads.count, -1).isfinite().all(1).tolist()
    held: list[float | None] = [None]
    if sweep:
        first = heads.top(scaler(train[held_out]))[len(config.lr) :, :, 0]
        held = (first == labels[held_out]).double().mean(1).tolist()
    top = heads.top(scaler(test))
    right = top == test_labels[:, None]
    results = []
    for i, lr in enumerate(config.lr):
        acc1, acc5 = (right[i, :, :n].any(1).double().mean().item() for n in (1, TOP))
        diverged = not all(finite[i :: len(config.lr)])
        results.append(HeadResult(lr, held[i], acc1, acc5, diverged))
    if all(head.diverged for head in results):
        raise ValueError(f"every head diverged at lr={config.lr}: give smaller ones, or normalize")
    chosen = max(range(len(results)), key=lambda i: _merit(results[i]))
    weight, bias = scaler.folded(heads.weight.view(heads.count, classes, -1)[chosen])
    return LinearResult(tuple(results), chosen, weight, bias, top[chosen].cpu(), single)


class Scaler(NamedTuple):
    """``(x - mean) * scale``, with a one behind for the bias."""

    mean: Tensor  # (F,)
    scale: Tensor  # (F,)

    @classmethod
    def identity(cls, x: Tensor) -> Scaler:
        """Leaves features (N, F) as they are."""
        return cls(torch.zeros_like(x[0]), torch.ones_like(x[0]))

    @classmethod
    def of(cls, x: Tensor) -> Scaler:
        """Gives every feature of (N, F) mean 0 and variance 1; one that never varies becomes 0."""
        deviation, mean = torch.std_mean(x, 0, correction=0)
        varies = deviation > 1e-6 * mean.abs()  # by more than rounding
        return cls(mean, torch.where(varies, 1 / deviation, torch.ones_like(deviation)))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, F + 1)."""
        return torch.cat([(x - self.mean) * self.scale, x.new_ones(len(x), 1)], 1)

    def folded(
        self,
        head: Tensor,  # (C, F + 1)
    ) -> tuple[Tensor, Tensor]:
        """Weight (C, F) and bias (C,) that do to features what ``head`` does to scaled ones."""
        weight = head[:, :-1] * self.scale
        return weight, head[:, -1] - weight @ self.mean


def _merit(head: HeadResult) -> tuple[bool, float, float]:
    """By what heads are chosen: held-out accuracy, then the smaller learning rate; never a diverged one."""
    return not head.diverged, head.held_out or 0.0, -head.lr


def cached_batches(train: Tensor, labels: Tensor, config: LinearConfig) -> Batches:
    """Batches of features in a new order every epoch; the last may be short."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = _order(len(train), config.seed, epoch).to(train.device)
        for rows in order.split(config.batch_size):
            yield train[rows], labels[rows], rows

    return batches


def augmented_batches(
    network: nn.Module, images: ImageSet, labels: Tensor, view: View, config: LinearConfig
) -> Batches:
    """Batches of features of random crops, drawn anew in every epoch."""
    size = min(config.batch_size, len(images))
    crop = AugmentConfig(view.size, CROP_SCALE, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    loader = BatchLoader(images, size, config.seed, view.workers, pin_memory=view.device.type == "cuda")

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = _order(len(images), config.seed, epoch)
        drawn = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
        for batch in loader.in_order(order):
            pixels = batch.images.to(view.device, non_blocking=True).expand(-1, len(view.mean), -1, -1)
            crops = random_view(pixels, crop, view.mean, view.std, drawn, batch.aspect)
            rows = batch.indices.to(view.device)
            with torch.no_grad():
                features = network(crops)
            yield features.float(), labels[rows], rows

    return batches


def hold_out(
    labels: Tensor,  # (N,) integers
    seed: int,
) -> tuple[Tensor, tuple[int, ...]]:
    """A tenth of every class, at least one image: (N,) bool; and the classes with a single image, kept."""
    order = _order(len(labels), seed, 0, HELD_OUT)  # not that of an epoch
    classes = labels.cpu()
    counts = classes.bincount()
    quota = torch.where(counts > 1, (counts // HELD_OUT).clamp(min=1), 0)
    mask = turns(classes, order) < quota[classes]
    return mask.to(labels.device), tuple((counts == 1).nonzero().flatten().tolist())


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _order(count: int, *key: int) -> Tensor:
    """A permutation that is a function of the key alone, on any device."""
    return torch.from_numpy(np.random.default_rng(key).permutation(count))
