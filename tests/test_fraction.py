"""Parts of a dataset: a fraction of every class, and the rows of an image set."""

import pytest
import torch
from images import write_image

from moco_fast.data.folder import FolderImages
from moco_fast.data.fraction import labelled_fraction
from moco_fast.data.images import ImageSet, MemoryImages


def test_labels_fraction():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2])[torch.randperm(141)]
    rows = labelled_fraction(labels, 0.05, 3)
    assert torch.bincount(labels[rows]).tolist() == [5, 2, 1]
    assert torch.equal(rows, labelled_fraction(labels, 0.05, 3)) and torch.equal(rows, rows.unique())
    assert not torch.equal(rows, labelled_fraction(labels, 0.05, 4))
    assert set(rows.tolist()) <= set(labelled_fraction(labels, 0.2, 3).tolist())
    assert torch.equal(labelled_fraction(labels, 1.0, 0), torch.arange(141))
    with pytest.raises(ValueError, match=r"labels_fraction must be in \(0, 1\], got 0"):
        labelled_fraction(labels, 0, 0)


def test_subsets_keep_pixels_labels_and_shapes(tmp_path):
    pixels, rows = torch.randint(256, (9, 1, 3, 3), dtype=torch.uint8), torch.tensor([7, 2, 2])
    part = ImageSet(MemoryImages(pixels, torch.arange(9.0)), torch.arange(9)).subset(rows)
    found = part.images.fetch(torch.tensor([0, 1]))
    assert torch.equal(found.images, pixels[[7, 2]]) and found.aspect.tolist() == [7.0, 2.0]
    assert part.labels.tolist() == [7, 2, 2] and len(part) == 3
    files = FolderImages([str(tmp_path / f"{i}.png") for i in range(4)], 8)
    for i in range(4):
        write_image(tmp_path / f"{i}.png", (60 * i, 0, 0), (8, 8))
    part = files.subset(torch.tensor([3, 1]))
    assert part.name_of(1) == str(tmp_path / "1.png") and len(part) == 2
    assert part.fetch(torch.tensor([0])).images[0, 0, 0, 0] == 180
