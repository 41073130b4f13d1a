"""Features of the images of a dataset, for whatever is built on them; shared out among processes.

With several processes each takes consecutive rows, cut where batches end: every batch is then computed as
one process would compute it, and so are the features, bit for bit.

Tests: tests/test_knn.py, tests/test_view.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moco_fast import checks
from moco_fast.data.augment import center_view
from moco_fast.data.images import Dataset, ImageSet
from moco_fast.data.loader import BatchLoader
from moco_fast.distributed import all_gather_rows, largest, rank, world_size
from moco_fast.evaluate.knn import extract_features

EVALUATION_BATCH = 500
# Pixels at most, where they are the features: 224 x 224 x 3 of each image fill the memory, and of a million
# images fewer do.
RAW_SIZE, RAW_BYTES = 64, 2**32
# What Resize(256) and CenterCrop(224) leave of the shorter side: the test view of ImageNet's figures.
CROP, CROP_FROM = 0.875, 224


@dataclass(frozen=True)
class View:
    """How a network is shown images in evaluation: a central square of each.

    Attributes:
        size: side in pixels.
        mean: per channel, subtracted from pixels in [0, 1]; as many as the network takes channels.
        std: per channel, divided by.
        device: where the network is.
        workers: processes that decode files.
        crop: side of the square over the shorter side of the image; None: 0.875, the official test view, of
            a directory's images at 224 pixels or more, else all of it.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    workers: int = 0
    crop: float | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < checks.number("crop", self.crop) <= 1:
            raise ValueError(f"crop must be in (0, 1], got {self.crop!r}")

    def crop_of(self, images: ImageSet) -> float:
        """What ``crop`` comes to for these images."""
        return self._crop(images.images.fetch(torch.zeros(1, dtype=torch.int64)).aspect is not None)

    def _crop(self, of_files: bool) -> float:
        if self.crop is not None:
            return self.crop
        return CROP if of_files and self.size >= CROP_FROM else 1.0

    def raw(
        self,
        count: int,  # of images that are kept as features
    ) -> View:
        """Pixels from 0 to 1, as features: cosine similarity depends on where zero is."""
        zeros, ones = [0.0] * len(self.mean), [1.0] * len(self.std)
        fits = math.isqrt(RAW_BYTES // (4 * count * len(self.mean)))
        return replace(self, size=max(1, min(self.size, RAW_SIZE, fits)), mean=zeros, std=ones)

    def of(
        self,
        images: ImageSet,
        rows: Tensor,  # (M,)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of network inputs (B, C, size, size), and which rows they are, (B,)."""
        size, pin = min(EVALUATION_BATCH, len(images)), self.device.type == "cuda"
        loader = BatchLoader(images, size, seed=0, workers=self.workers, pin_memory=pin)
        for batch in loader.in_order(rows):
            pixels = batch.images.to(self.device, non_blocking=True).expand(-1, len(self.mean), -1, -1)
            crop = self._crop(batch.aspect is not None)
            yield center_view(pixels, self.size, self.mean, self.std, batch.aspect, crop), batch.indices


def features_of(
    network: nn.Module,
    images: ImageSet,
    rows: Tensor,  # (M,)
    view: View,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features (M, F) float32 of the images at ``rows``, in that order, on the network's device.

    Args:
        network: called in eval mode, on ``view.device``.
        images: where the rows are.
        rows: of the images.
        view: what the network is shown.
        call: what to call for features; default: ``network`` itself.
    """
    return extract_features(network, view.of(images, rows), call or network, len(rows))[0]


def share(count: int, unit: int, of_rank: int) -> slice:
    """A process's of ``count`` rows: consecutive ones in rank order, cut at multiples of ``unit``."""
    units = -(-count // unit)
    first, last = (units * r // world_size() * unit for r in (of_rank, of_rank + 1))
    return slice(min(first, count), min(last, count))


def own_features(
    network: nn.Module,
    images: ImageSet,
    rows: Tensor,  # (M,), the same on all processes
    view: View,
    unit: int,
) -> Tensor:
    """Features of this process's share of the rows, (share, F): none, where it has none.

    Args:
        network, images, rows, view: as for :func:`features_of`.
        unit: rows that stay together; a multiple of the batch.
    """
    own = rows[share(len(rows), unit, rank())]
    found = features_of(network, images, own, view) if len(own) else torch.empty(0, 0, device=view.device)
    (width,) = largest(found.shape[1])
    return found if len(own) else found.new_empty(0, width)


def all_features(network: nn.Module, images: ImageSet, rows: Tensor, view: View) -> Tensor:
    """Features of all rows on every process, (M, F), each computed by one of them."""
    own = own_features(network, images, rows, view, EVALUATION_BATCH)
    if world_size() == 1:
        return own
    parts = [share(len(rows), EVALUATION_BATCH, r) for r in range(world_size())]
    sizes = [part.stop - part.start for part in parts]
    padded = own.new_zeros(max(sizes), own.shape[1])
    padded[: len(own)] = own
    shares = all_gather_rows(padded).split(max(sizes))
    return torch.cat([rows[:size] for rows, size in zip(shares, sizes, strict=True)])


def labels_missing(dataset: Dataset) -> str | None:
    """Why nothing can be classified on this dataset, or None."""
    if dataset.train.labels is None:
        return "the images have no class labels (one sub-folder per class gives them)"
    if dataset.test is None or dataset.test.labels is None:
        return "no images are held out (a tenth of every class with at least five images would be)"
    return None


def need_labels(
    dataset: Dataset,
    wanted: str = "measured",  # or "learned", which cannot be done either
) -> None:
    """Raise ValueError if nothing can be classified on this dataset; says why."""
    if reason := labels_missing(dataset):
        raise ValueError(f"data {dataset.name!r} cannot be {wanted}: {reason}")


def spread(count: int, most: int) -> Tensor:
    """All rows, or ``most`` of them drawn once and for all: files are often sorted by class."""
    if most >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
