"""A directory of images: what is in it, what its sub-folders mean, and how its files are served.

folder/*.jpg                       no labels
folder/<class>/**/*.jpg            labels; a tenth of every class is held out
folder/train/..., folder/val/...   the split is given (``valid/``, ``validation/`` and ``test/`` work too)
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moco_fast.data.decode import check_header, decode
from moco_fast.data.images import Dataset, Fetched, ImageSet, Log, MemoryImages
from moco_fast.extras import extra

MEMORY_BUDGET = 1 << 30  # bytes of decoded pixels up to which a folder is decoded once and kept
MANY = 2_000  # files from which on a progress bar is shown
BLOCK = 64  # files per task of the thread pool
HELD_OUT = ("val", "valid", "validation", "test")  # folders beside "train", in any case
NAMED = 5  # bad files that a message names

# Pillow registers these, but reads them only with outside programs or not at all.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

T = TypeVar("T")
R = TypeVar("R")


class FolderImages:
    """Image files, decoded on request.

    Args:
        paths: files, all of which have a readable header.
        canvas: side of the squares they are squashed to.
        labels: class of each, (N,) int64, if they have any.
    """

    channels = 3
    in_memory = False

    def __init__(self, paths: Sequence[str], canvas: int, labels: Tensor | None = None) -> None:
        # One array instead of a list of str: touching a str writes its reference count, so every forked
        # worker would end up with its own copy of the list.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.canvas = canvas
        self._labels = np.zeros(len(self._paths), dtype=np.int64) if labels is None else labels.numpy()

    def __len__(self) -> int:
        return len(self._paths)

    def name_of(self, index: int) -> str:
        """Path of one image."""
        return os.fsdecode(bytes(self._paths[index]))

    def subset(self, rows: Tensor) -> FolderImages:
        """The files at ``rows``, (M,) int64."""
        labels = torch.from_numpy(self._labels)[rows]
        return FolderImages([self.name_of(row) for row in rows.tolist()], self.canvas, labels)

    def fetch(self, indices: Tensor) -> Fetched:
        """Decode the files at ``indices``, (B,) int64; a broken file is replaced by the next whole one.

        By one of its class, if there is any: what is computed from it may be taken for the class.

        Raises:
            OSError: not one file of the folder can be decoded.
        """
        images = np.empty((len(indices), 3, self.canvas, self.canvas), dtype=np.uint8)
        aspect = np.empty(len(indices), dtype=np.float32)
        served, broken = indices.clone(), []
        for row, index in enumerate(indices.tolist()):
            for at in self._candidates(index):
                result = decode(bytes(self._paths[at]), self.canvas)
                if not isinstance(result, str):
                    break
                broken.append((at, result))
            else:
                why = dict(broken)[index]
                raise OSError(f"no image can be decoded any more; {self.name_of(index)}: {why}")
            images[row], aspect[row] = result
            served[row] = at
        return Fetched(torch.from_numpy(images), torch.from_numpy(aspect), served, tuple(broken))

    def _candidates(self, index: int) -> Iterator[int]:
        """A file, and then those that may stand for it."""
        yield index
        same = np.flatnonzero(self._labels == self._labels[index])
        first = np.searchsorted(same, index, side="right")
        yield from np.roll(same, -first)[:-1].tolist()
        yield from np.flatnonzero(self._labels != self._labels[index]).tolist()


def load_folder(
    root: Path,
    canvas: int,
    log: Log,
    known_names: Iterable[str] = (),
) -> Dataset:
    """Read a directory of images; see the layouts at the top of this file.

    Args:
        root: the directory.
        canvas: side in pixels of the squares that images are squashed to.
        log: receives a line about skipped files.
        known_names: dataset names to suggest when the directory does not exist.
    """
    _check_directory(root, known_names)
    train_root, test_root = _split_roots(root)
    train_files = _readable(train_root, log)
    _need_two(len(train_files), train_root)
    classes = _classes(train_files)
    if test_root is not None:
        test_files = _known_classes(test_root, _readable(test_root, log), classes, log)
        split = f"split as in {train_root.name}/ and {test_root.name}/"
    elif classes:
        train_files, test_files = _hold_out(train_files)
        split = "a tenth of every class held out" if test_files else "no class has 5 images to hold one out"
    else:
        test_files, split = [], f"no labels, for {_why_no_classes(train_files)}"

    total = 3 * canvas * canvas * (len(train_files) + len(test_files))
    fits = total <= MEMORY_BUDGET
    halves = []
    for base, files in ((train_root, train_files), (test_root or train_root, test_files)):
        labels = torch.tensor([classes[_top(file)] for file in files]) if classes else None
        images = FolderImages([os.path.join(base, file) for file in files], canvas, labels)
        halves.append(_decode_once(images, labels, log) if fits else ImageSet(images, labels))
    train, test = halves
    _need_two(len(train), train_root)
    how = "decoded once into memory" if fits else f"decoded by the loader ({total / 2**30:.1f} GiB)"
    note = f"{len(train) + len(test):,} images in {root}; {split}; {how}"
    return Dataset(str(root), train, test if len(test) else None, tuple(classes), note)


def _check_directory(root: Path, known_names: Iterable[str]) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise NotADirectoryError(f"{root} is a file; expected a directory of images")
    parent = root.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    close = [str(parent / name) for name in difflib.get_close_matches(root.name, names)]
    close += difflib.get_close_matches(str(root), list(known_names))
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise FileNotFoundError(
        f"data must be a directory of images or the name of a dataset, got {str(root)!r}{hint}"
    )


def _split_roots(root: Path) -> tuple[Path, Path | None]:
    """The directories to train and to test on; ``val`` goes before ``test``, which often lacks labels."""
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): root / entry.name for entry in entries if entry.is_dir()}
    held_out = [folders[name] for name in HELD_OUT if name in folders]
    if "train" in folders and held_out:
        return folders["train"], held_out[0]
    return root, None


def _need_two(count: int, root: Path) -> None:
    if count < 2:
        images = "1 readable image" if count else "no readable image"
        raise ValueError(f"{root} holds {images}; contrastive learning needs at least 2")


def _readable(root: Path, log: Log) -> list[str]:
    """Every file below ``root`` that Pillow recognises, relative and sorted; bad ones are logged."""
    suffixes = {ext for ext, kind in extra("PIL.Image").registered_extensions().items() if kind not in _STUBS}
    every = list(_walk(root))
    files = [file for file in every if _suffix(file) in suffixes]
    if not files:
        kinds = Counter(_suffix(file) or "no suffix" for file in every).most_common(3)
        found = "only " + ", ".join(f"{n} {kind}" for kind, n in kinds) if kinds else "it is empty"
        raise ValueError(f"{root} holds no images: {found}")
    reasons = _parallel(lambda file: check_header(os.path.join(root, file)), files, f"Checking {root.name}")
    _report([(os.path.join(root, file), why) for file, why in zip(files, reasons, strict=True) if why], log)
    return [file for file, why in zip(files, reasons, strict=True) if not why]


def _report(bad: Sequence[tuple[str, str]], log: Log) -> None:
    if not bad:
        return
    log(f"Skipped {len(bad)} image file{'s' if len(bad) > 1 else ''} that cannot be read:")
    for file, why in bad[:NAMED]:
        log(f"  {file}: {why}")
    if len(bad) > NAMED:
        log(f"  ... and {len(bad) - NAMED} more")


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _walk(root: Path) -> Iterator[str]:
    """Files below ``root``, relative, in a fixed order, none hidden; links are followed once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if relative == os.curdir else os.path.join(relative, name)


def _top(file: str) -> str:
    """First folder of a relative path; empty for a bare file name."""
    return file.split(os.sep, 1)[0] if os.sep in file else ""


def _classes(files: Sequence[str]) -> dict[str, int]:
    """Label of every class name, in sorted order; empty where folders do not tell classes apart."""
    names = sorted({_top(file) for file in files})
    return {name: label for label, name in enumerate(names)} if len(names) > 1 and "" not in names else {}


def _why_no_classes(files: Sequence[str]) -> str:
    loose = [file for file in files if not _top(file)]
    if 0 < len(loose) < len(files):
        return f"it has images beside the class folders, such as {loose[0]}"
    return "it has no two class folders"


def _known_classes(root: Path, files: list[str], classes: dict[str, int], log: Log) -> list[str]:
    """The test files of classes that training knows; all of them without classes."""
    known = [file for file in files if not classes or _top(file) in classes]
    if len(known) < len(files):
        log(f"Left out {len(files) - len(known)} of {len(files)} images in {root}: no such class in training")
    return known


def _hold_out(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """A tenth of every class of at least five, by hash of the path: the same on every computer."""

    def rank(file: str) -> bytes:
        return hashlib.sha256(os.fsencode(file.replace(os.sep, "/"))).digest()

    by_class: dict[str, list[str]] = {}
    for file in files:
        by_class.setdefault(_top(file), []).append(file)
    test: set[str] = set()
    for members in by_class.values():
        if len(members) >= 5:
            test.update(sorted(members, key=rank)[: max(1, round(len(members) / 10))])
    return [file for file in files if file not in test], [file for file in files if file in test]


def _decode_once(images: FolderImages, labels: Tensor | None, log: Log) -> ImageSet:
    """Decode every file into memory, leaving out the broken ones."""
    pixels = np.empty((len(images), 3, images.canvas, images.canvas), dtype=np.uint8)
    aspect = np.empty(len(images), dtype=np.float32)

    def load(index: int) -> str | None:
        result = decode(images.name_of(index), images.canvas)
        if isinstance(result, str):
            return result
        pixels[index], aspect[index] = result
        return None

    reasons = _parallel(load, range(len(images)), "Decoding")
    _report([(images.name_of(i), why) for i, why in enumerate(reasons) if why], log)
    if any(reasons):
        keep = np.array([why is None for why in reasons])
        pixels, aspect = pixels[keep], aspect[keep]
        labels = None if labels is None else labels[torch.from_numpy(keep)]
    return ImageSet(MemoryImages(torch.from_numpy(pixels), torch.from_numpy(aspect)), labels)


def _parallel(work: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """``[work(item) for item in items]`` on threads (Pillow decodes without the GIL), with a bar if long."""
    # In blocks: a million files would make a million futures.
    blocks = [items[at : at + BLOCK] for at in range(0, len(items), BLOCK)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results: Iterable[list[R]] = pool.map(lambda block: [work(item) for item in block], blocks)
        if len(items) >= MANY:
            track = extra("rich.progress").track
            results = track(results, description=what, total=len(blocks), transient=True)
        return [result for block in results for result in block]
