"""CIFAR-10 and CIFAR-100 as torchvision keeps them: find a copy on this computer, else download it.

60,000 colour images of 32 x 32 pixels, 10,000 of them to test on, in 10 or 100 classes.

Tests: tests/test_cifar.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moco_fast.data import download
from moco_fast.data.images import Dataset, ImageSet, Log, MemoryImages
from moco_fast.extras import extra

NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # the classes in torchvision.datasets
DOWNLOAD_SECONDS = 1200  # 170 MB at 150 KB/s


def load(name: str, may_download: bool, log: Log) -> Dataset:
    """Load "cifar10" or "cifar100" into memory, 180 MB.

    Raises:
        FileNotFoundError: no copy on this computer, and none could be downloaded; says where to put one.
    """
    cls = getattr(extra("torchvision.datasets"), NAMES[name])
    for root in download.roots():
        if (found := _read(cls, name, root, log)) is not None:
            return found
    reason = "downloading is off"
    if may_download:
        root = download.cache_dir()
        log(f"{name} (170 MB) is not here yet: downloading to {root} ...")
        root.mkdir(parents=True, exist_ok=True)
        reason = download.with_torchvision(cls.__name__, root, DOWNLOAD_SECONDS) or ""
        if not reason and (found := _read(cls, name, root, log)) is not None:
            return found
        reason = f"the download failed ({reason or 'it holds no whole copy'})"
    places = " or ".join(str(root) for root in download.roots())
    raise FileNotFoundError(
        f"{name} is not on this computer and {reason}: put {cls.filename} from {cls.url} into {places}, or "
        "name another directory in MOCO_FAST_DATA"
    )


def _read(cls: Any, name: str, root: Path, log: Log) -> Dataset | None:
    """The copy in a directory, unpacked first if only the archive is there; None without one."""
    if not (root / cls.base_folder).is_dir():
        if not (root / cls.filename).is_file():
            return None
        if failure := download.with_torchvision(cls.__name__, root, DOWNLOAD_SECONDS):
            log(f"{root / cls.filename} is not usable: {failure}")
            return None
    try:
        halves = [cls(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:  # RuntimeError: a checksum is wrong
        log(f"{root / cls.base_folder} is not usable: {error}")
        return None
    train, test = (
        ImageSet(
            MemoryImages(torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous()),
            torch.tensor(half.targets),
        )
        for half in halves
    )
    return Dataset(name, train, test, tuple(halves[0].classes), f"{name}, found in {root}")
