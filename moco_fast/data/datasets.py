"""Find a dataset by name or directory: Fashion-MNIST, digits, CIFAR, or a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from moco_fast.data import cifar, fashion_mnist
from moco_fast.data.folder import load_folder
from moco_fast.data.images import Dataset, ImageSet, Log, MemoryImages
from moco_fast.extras import extra

NAMES = ("fashion-mnist", "digits", *cifar.NAMES)
DIGITS_TEST = 360  # of 1,797: one fifth


def absolute(name_or_dir: str) -> str:
    """A directory as an absolute path, for runs that are resumed elsewhere; anything else as it is."""
    folder = Path(name_or_dir).expanduser()
    return str(folder.resolve()) if name_or_dir not in NAMES and folder.is_dir() else name_or_dir


def load_dataset(
    name_or_dir: str | os.PathLike[str],
    *,
    canvas: int = 448,
    download: bool = True,
    log: Log = print,
) -> Dataset:
    """Load ``"fashion-mnist"``, ``"digits"``, ``"cifar10"``, ``"cifar100"``, or a directory of images.

    Under ``torchrun`` let one process load first: others then find what it downloaded.

    Args:
        name_or_dir: dataset name, or path of a directory. A name wins over a directory
            that is called the same; write ``./digits`` for the directory.
        canvas: side in pixels of the squares that a directory's images are squashed to.
            Named datasets keep their own size.
        download: fetch Fashion-MNIST or CIFAR when no copy is found here. Where the download of
            Fashion-MNIST fails and this process is root on Debian or Ubuntu, the package
            ``dataset-fashion-mnist`` is installed by apt-get instead, which ``log`` is told.
        log: receives one line per thing worth knowing, such as skipped files.

    Returns:
        The dataset; its ``note`` says where it came from.

    Raises:
        FileNotFoundError: no such name or directory, or CIFAR cannot be had.
        NotADirectoryError: the path is a file.
        ValueError: the directory holds fewer than two readable images, or ``canvas`` < 1.
    """
    if canvas < 1:
        raise ValueError(f"canvas must be at least 1 pixel, got {canvas}")
    if name_or_dir == "digits":
        return _digits("scikit-learn's 8x8 digits, as asked")
    if name_or_dir == "fashion-mnist":
        return _fashion_mnist(download, log)
    if name_or_dir in cifar.NAMES:
        return cifar.load(str(name_or_dir), download, log)
    return load_folder(Path(name_or_dir).expanduser(), canvas, log, known_names=NAMES)


def _fashion_mnist(download: bool, log: Log) -> Dataset:
    """Fashion-MNIST, or digits where it cannot be had."""
    found = fashion_mnist.find(log)
    if found is None and download:
        found = fashion_mnist.fetch(log)
    if found is None:
        reason = "no source could be reached" if download else "downloading is off"
        log(f"Fashion-MNIST is not on this computer and {reason}:")
        log("using scikit-learn's digits instead (1,797 images of 8x8, so results mean far less).")
        return _digits(f"scikit-learn's 8x8 digits, in place of Fashion-MNIST: {reason}")
    train, test, note = found
    return Dataset(
        name="fashion-mnist",
        train=ImageSet(MemoryImages(train[0]), train[1]),
        test=ImageSet(MemoryImages(test[0]), test[1]),
        class_names=fashion_mnist.CLASSES,
        note=note,
    )


def _digits(note: str) -> Dataset:
    """1,437 images to train on and 360 held out, every class in proportion."""
    bunch = extra("sklearn.datasets").load_digits()
    split = extra("sklearn.model_selection").train_test_split
    # Brightness comes as 0..16; 255/16 is not whole, so round instead of truncating.
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    rows = split(range(len(labels)), test_size=DIGITS_TEST, stratify=bunch.target, random_state=0)
    train, test = (ImageSet(MemoryImages(pixels[half]), labels[half]) for half in rows)
    return Dataset("digits", train, test, tuple(str(name) for name in bunch.target_names), note)
