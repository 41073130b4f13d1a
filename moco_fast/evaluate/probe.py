"""kNN accuracy of a model on a dataset, and the gallery of nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moco_fast.data.augment import center_view
from moco_fast.data.images import Dataset, ImageSet
from moco_fast.data.loader import BatchLoader
from moco_fast.evaluate.knn import extract_features, knn_accuracy, nearest_neighbours
from moco_fast.evaluate.pictures import plot_neighbours
from moco_fast.models.method import Method

EVALUATION_BATCH = 500
GALLERY_QUERIES = 10
GALLERY_NEIGHBOURS = 8


class KnnProbe:
    """Features of training images vote on test images; the same images every time.

    Args:
        dataset: what to evaluate on.
        image_size: side of the evaluation view.
        mean: per channel.
        std: per channel.
        device: where the model is.
        k: neighbours that vote, weighted by exp(similarity / 0.1).
        bank: training images that vote, at most.
        workers: processes that decode files.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        k: int,
        bank: int,
        workers: int,
    ) -> None:
        self.dataset, self.k = dataset, k
        self._view = (image_size, mean, std)
        self._device, self._workers = device, workers
        self.bank = _spread(len(dataset.train), bank)

    def measurable(self) -> str | None:
        """Why there is no accuracy to measure on this dataset, or None if there is."""
        test = self.dataset.test
        if test is None or test.labels is None or self.dataset.train.labels is None:
            return "the images have no class labels (one sub-folder per class gives them)"
        if len(self.bank) < self.k:
            return f"{len(self.bank)} training images are fewer than knn_k={self.k}"
        return None

    def accuracy(self, model: Method | None, queries: int | None = None) -> float:
        """Accuracy of the query encoder's features, in [0, 1]; of raw pixels for None.

        Args:
            model: whose features, or None.
            queries: test images at most; None takes all.
        """
        if reason := self.measurable():
            raise ValueError(f"kNN accuracy cannot be measured: {reason}")
        train, test = self.dataset.train, self.dataset.test
        assert test is not None and test.labels is not None and train.labels is not None
        rows = _spread(len(test), queries or len(test))
        return knn_accuracy(
            self._features(model, train, self.bank),
            train.labels[self.bank],
            self._features(model, test, rows),
            test.labels[rows],
            k=self.k,
        )

    def gallery(self, model: Method, out_png: Path) -> None:
        """Write a picture of test images (or training images, without a test half) and their neighbours."""
        held_out = self.dataset.test is not None
        asked = self.dataset.test or self.dataset.train
        # Asked from the bank itself, an image would find itself: those are taken out, half of them at most.
        rows = _one_per_class(asked, GALLERY_QUERIES if held_out else min(GALLERY_QUERIES, len(asked) // 2))
        bank = self.bank if held_out else self.bank[~torch.isin(self.bank, rows)]
        count = min(GALLERY_NEIGHBOURS, len(bank))
        near = nearest_neighbours(
            self._features(model, self.dataset.train, bank), self._features(model, asked, rows), count
        )
        found = bank[near.indices.cpu()]  # (queries, count)
        pictures = self.dataset.train.images.fetch(found.flatten()).images
        labels = self.dataset.train.labels
        plot_neighbours(
            asked.images.fetch(rows).images,
            pictures.unflatten(0, found.shape),
            None if asked.labels is None else asked.labels[rows],
            None if labels is None else labels[found],
            self.dataset.class_names,
            out_png,
            near.similarities.cpu(),
        )

    def _features(self, model: Method | None, images: ImageSet, rows: Tensor) -> Tensor:
        """Features of the images at ``rows``, in that order, on the CPU."""
        if model is None:
            return torch.cat([view.flatten(1).cpu() for view, _ in self._views(images, rows, raw=True)])
        features, _ = extract_features(model, self._views(images, rows), model.features)
        return features.cpu()

    def _views(self, images: ImageSet, rows: Tensor, raw: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        size, mean, std = self._view
        if raw:  # pixels from 0 to 1: cosine similarity depends on where zero is
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        loader = BatchLoader(images, min(EVALUATION_BATCH, len(images)), seed=0, workers=self._workers)
        for batch in loader.in_order(rows):
            aspect = None if batch.aspect is None else batch.aspect.to(self._device)
            pixels = batch.images.to(self._device).expand(-1, len(mean), -1, -1)
            yield center_view(pixels, size, mean, std, aspect), batch.indices


def _spread(count: int, most: int) -> Tensor:
    """All rows, or ``most`` of them drawn once and for all: files are often sorted by class."""
    if most >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _one_per_class(images: ImageSet, most: int) -> Tensor:
    """The first image of every class, then others spread over the set."""
    rows: list[int] = []
    if images.labels is not None:
        rows = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique()][:most]
    for row in torch.linspace(0, len(images) - 1, most).long().tolist():
        if len(rows) < min(most, len(images)) and row not in rows:
            rows.append(row)
    return torch.tensor(rows)
