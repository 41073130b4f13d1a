"""kNN accuracy of a model on a dataset, and the gallery of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moco_fast.data.images import Dataset, ImageSet
from moco_fast.evaluate.features import View, features_of, labels_missing, spread
from moco_fast.evaluate.knn import knn_accuracy, nearest_neighbours
from moco_fast.evaluate.pictures import plot_neighbours
from moco_fast.models.method import Method

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
        self._view = View(image_size, mean, std, device, workers)
        self.bank = spread(len(dataset.train), bank)

    def measurable(self) -> str | None:
        """Why there is no accuracy to measure on this dataset, or None if there is."""
        if reason := labels_missing(self.dataset):
            return reason
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
        rows = spread(len(test), queries or len(test))
        return knn_accuracy(
            self._features(model, train, self.bank),
            train.labels[self.bank],
            self._features(model, test, rows),
            test.labels[rows],
            k=self.k,
        )

    def gallery(self, model: nn.Module, out_png: Path) -> None:
        """Write a picture of test images (or training images, without a test half) and their neighbours."""
        held_out = self.dataset.test is not None
        queries = self.dataset.test or self.dataset.train
        # Asked from the bank itself, an image would find itself: those are taken out, half of them at most.
        rows = _one_per_class(
            queries, GALLERY_QUERIES if held_out else min(GALLERY_QUERIES, len(queries) // 2)
        )
        bank = self.bank if held_out else self.bank[~torch.isin(self.bank, rows)]
        count = min(GALLERY_NEIGHBOURS, len(bank))
        near = nearest_neighbours(
            self._features(model, self.dataset.train, bank), self._features(model, queries, rows), count
        )
        found = bank[near.indices.cpu()]  # (queries, count)
        pictures = self.dataset.train.images.fetch(found.flatten()).images
        labels = self.dataset.train.labels
        plot_neighbours(
            queries.images.fetch(rows).images,
            pictures.unflatten(0, found.shape),
            None if queries.labels is None else queries.labels[rows],
            None if labels is None else labels[found],
            self.dataset.class_names,
            out_png,
            near.similarities.cpu(),
        )

    def _features(self, model: nn.Module | None, images: ImageSet, rows: Tensor) -> Tensor:
        """Features of the images at ``rows``, on the device: a method's, or what another network returns."""
        if model is None:
            return features_of(nn.Flatten(), images, rows, self._view.raw(len(self.bank)))
        call = model.features if isinstance(model, Method) else None
        return features_of(model, images, rows, self._view, call)


def _one_per_class(images: ImageSet, most: int) -> Tensor:
    """The first image of every class, then others spread over the set."""
    rows: list[int] = []
    if images.labels is not None:
        rows = [int((images.labels == label).nonzero()[0]) for label in images.labels.unique()][:most]
    for row in torch.linspace(0, len(images) - 1, most).long().tolist():
        if len(rows) < min(most, len(images)) and row not in rows:
            rows.append(row)
    return torch.tensor(rows)
