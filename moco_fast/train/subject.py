"""What evaluating commands start from: a checkpoint, a dataset that suits it, and what to compare it with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moco_fast.data.images import Dataset
from moco_fast.evaluate.features import View, need_labels
from moco_fast.evaluate.pictures import plot_confusion
from moco_fast.evaluate.scores import confusion
from moco_fast.train.build import choose_device
from moco_fast.train.pretrained import Pretrained, dataset_for, load_pretrained
from moco_fast.train.processes import first_on_machine

TRAINED, RANDOM, PIXELS = "trained", "random init", "raw pixels"


@dataclass(frozen=True)
class Subject:
    """A pretrained backbone on the device, and labelled images that it can be shown.

    Attributes:
        checkpoint: where it was loaded from.
        pretrained: the backbone and its facts.
        dataset: with labels on both halves.
        view: how the backbone is shown images.
    """

    checkpoint: Path
    pretrained: Pretrained
    dataset: Dataset
    view: View

    def __str__(self) -> str:
        return f"{self.dataset.name}, {self.pretrained.arch}, {self.pretrained.method}"

    @property
    def crop(self) -> float:
        """Side of the central squares that are shown, over the shorter side of the images."""
        return self.view.crop_of(self.dataset.train)

    def folder(self, what: str) -> Path:
        """Where results go unless told otherwise: WHAT-DATA beside the checkpoint."""
        beside = self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent
        return beside / f"{what}-{self.dataset.short_name}"

    def plot_confusion(
        self,
        predicted: Tensor,  # (M,) classes of the test images
        out_png: Path,
        by: str,
    ) -> None:
        """Draw which classes of the test images are taken for which."""
        test = self.dataset.test
        assert test is not None and test.labels is not None
        names, pretrained = self.dataset.class_names, self.pretrained
        counts = confusion(predicted.cpu(), test.labels, len(names))
        heading = f"{self.dataset.short_name}, {pretrained.arch}, {pretrained.method}\n{by}"
        plot_confusion(counts, names, out_png, heading)

    def rows(
        self,
        count: int,  # of images whose features are kept
        baselines: bool = True,
    ) -> list[tuple[str, nn.Module, View]]:
        """What to measure, by name: raw pixels, the backbone as it was initialised, and as it was trained."""
        own = (TRAINED, self.pretrained.backbone, self.view)
        if not baselines:
            return [own]
        fresh = self.pretrained.fresh().to(self.view.device)
        return [(PIXELS, nn.Flatten(), self.view.raw(count)), (RANDOM, fresh, self.view), own]


def load_subject(
    checkpoint: str | os.PathLike[str],
    data: str | None,
    device: str,
    log: Callable[[str], object],
    *,
    arch: str | None = None,
    image_size: int | None = None,
    workers: int = 2,
    crop: float | None = None,
) -> Subject:
    """Load a checkpoint and a dataset to evaluate it on; by default the one it was trained on.

    Raises:
        FileNotFoundError: no such checkpoint or dataset.
        ValueError: no usable device, a checkpoint that cannot be used, or images that do not suit it or have
            no labels.
    """
    place = choose_device(device)
    pretrained = load_pretrained(checkpoint, arch=arch, image_size=image_size)
    size, mean, std = pretrained.image_size, pretrained.mean, pretrained.std
    view = View(size, mean, std, torch.device(place), workers, crop)
    dataset = first_on_machine(lambda: dataset_for(pretrained, data, log))
    need_labels(dataset)
    pretrained.backbone.to(place)
    return Subject(Path(checkpoint), pretrained, dataset, view)
