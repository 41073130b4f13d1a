"""What every dataset looks like: images by index, labels, and a train and a test half.

A source answers ``fetch(indices)`` with uint8 pixels. Whether they come from
memory or from files is the source's affair; the loader only asks ``in_memory``
to know if worker processes pay.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Log = Callable[[str], object]


class Fetched(NamedTuple):
    """The images that answer one request, in its order."""

    images: Tensor  # (B, C, H, W) uint8
    aspect: Tensor | None  # (B,) float32, original width / height; None: the pixels are as they were
    indices: Tensor  # (B,) int64, the images really returned: differs from the request at broken files
    broken: tuple[tuple[int, str], ...]  # (index, why) of every requested image that could not be read


class ImageSource(Protocol):
    """Images by index."""

    channels: int
    in_memory: bool

    def __len__(self) -> int:
        """Number of images."""
        ...

    def fetch(self, indices: Tensor) -> Fetched:
        """Images at ``indices``, (B,) int64."""
        ...

    def name_of(self, index: int) -> str:
        """What to call one image in a message."""
        ...

    def subset(self, rows: Tensor) -> ImageSource:
        """The images at ``rows``, (M,) int64, as a source of their own."""
        ...


class MemoryImages:
    """Images held as one uint8 tensor.

    Args:
        pixels: every image, (N, C, H, W) uint8.
        aspect: original width / height of images that were squashed to a square, (N,).
    """

    in_memory = True

    def __init__(self, pixels: Tensor, aspect: Tensor | None = None) -> None:
        if pixels.ndim != 4 or pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be (N, C, H, W) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
        if aspect is not None and aspect.shape != pixels.shape[:1]:
            raise ValueError(f"aspect must be ({len(pixels)},), got {tuple(aspect.shape)}")
        self.pixels = pixels
        self.aspect = aspect
        self.channels = pixels.shape[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, indices: Tensor) -> Fetched:
        """Copy the rows at ``indices``."""
        aspect = None if self.aspect is None else self.aspect[indices]
        return Fetched(self.pixels[indices], aspect, indices, ())

    def name_of(self, index: int) -> str:
        """What to call one image in a message."""
        return f"image {index}"

    def subset(self, rows: Tensor) -> MemoryImages:
        """A copy of the images at ``rows``, (M,) int64."""
        return MemoryImages(self.pixels[rows], None if self.aspect is None else self.aspect[rows])


@dataclass(frozen=True)
class ImageSet:
    """The images of one half, train or test, and their labels."""

    images: ImageSource
    labels: Tensor | None  # (N,) int64

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> ImageSet:
        """The images at ``rows``, (M,) int64, and their labels."""
        return ImageSet(self.images.subset(rows), None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """A named dataset.

    Attributes:
        name: what was loaded, which a fallback makes differ from what was asked for.
        train: images to train on.
        test: images held out, or None where there are none.
        class_names: names by label; empty without labels.
        note: one line, where the images came from and why from there.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    note: str

    @property
    def short_name(self) -> str:
        """Of a directory its own name alone."""
        return Path(os.path.abspath(self.name)).name

    @property
    def channels(self) -> int:
        """Channels of every image, 1 or 3."""
        return self.train.images.channels
