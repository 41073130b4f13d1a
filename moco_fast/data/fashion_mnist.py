"""Fashion-MNIST: find it on this computer, else download it, else install Debian's package."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from moco_fast.data import download
from moco_fast.data.images import Log

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
COUNTS = {"train": 60_000, "t10k": 10_000}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

DOWNLOAD_SECONDS = 300  # 30 MB at 100 KB/s
APT_SECONDS = 120  # per apt-get call

Half = tuple[Tensor, Tensor]  # images (N, 1, 28, 28) uint8, labels (N,) int64
Found = tuple[Half, Half, str]  # train, test, note


def places() -> list[Path]:
    """Directories that may hold the four files, best first."""
    return [root / sub for root in download.roots() for sub in ("", "fashion-mnist", "FashionMNIST/raw")] + [
        DEBIAN
    ]


def find(log: Log) -> Found | None:
    """Read the first whole copy on this computer; a broken one is reported and passed over."""
    for place in places():
        paths = [_existing(place / name) for name in _names()]
        if not any(paths):
            continue
        try:
            train, test = (_read_half(place, half) for half in COUNTS)
        except (OSError, ValueError) as error:
            log(f"Fashion-MNIST in {place} is not usable: {error}")
            continue
        return train, test, f"Fashion-MNIST, found in {place}"
    return None


def fetch(log: Log) -> Found | None:
    """Get a copy from the internet or from Debian; None, with the reasons logged, where neither works."""
    log(f"Fashion-MNIST (30 MB) is not here yet: downloading to {download.cache_dir()} ...")
    if failure := _download(download.cache_dir()):
        log(f"Download failed: {failure}")
    elif found := find(log):
        return *found[:2], f"{found[2]}, downloaded by torchvision"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None
    log("Installing Debian's package dataset-fashion-mnist instead ...")
    if failure := _apt_install():
        log(f"apt-get failed: {failure}")
    elif found := find(log):
        return *found[:2], f"{found[2]}, from Debian's package because the download failed"
    return None


def read_idx(
    path: Path,  # plain, or gzip by its suffix .gz
    ndim: int,
) -> Tensor:
    """Read an idx file of bytes: magic ``00 00 08 ndim``, big-endian sizes, then the data.

    Raises:
        ValueError: wrong magic or truncated, with the file's name.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file ({error})") from error
    start = 4 + 4 * ndim
    if len(data) < start or data[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path} is not an idx file of bytes with {ndim} dimensions (starts {data[:4].hex()})"
        )
    shape = struct.unpack(f">{ndim}I", data[4:start])
    held, needed = len(data) - start, math.prod(shape)
    if held != needed:
        raise ValueError(f"{path} holds {held} bytes where its header {shape} needs {needed}")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)


def _names() -> list[str]:
    return [f"{half}-{part}-ubyte" for half in COUNTS for part in ("images-idx3", "labels-idx1")]


def _existing(path: Path) -> Path | None:
    """The file itself or its gzip."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _read_half(place: Path, half: str) -> Half:
    images_path, labels_path = (_existing(place / n) for n in _names() if n.startswith(half))
    if images_path is None or labels_path is None:
        raise ValueError(f"the {half} images or labels are missing")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    wanted = (COUNTS[half], 28, 28)
    if images.shape != wanted:
        raise ValueError(f"{images_path} has shape {tuple(images.shape)}, expected {wanted}")
    # MNIST has the same file names and sizes; only Fashion-MNIST has every class equally often.
    each = COUNTS[half] // len(CLASSES)
    if torch.bincount(labels).tolist() != [each] * len(CLASSES):
        raise ValueError(f"{labels_path} does not have {each} labels of every class: MNIST?")
    return images[:, None], labels


def _download(target: Path) -> str | None:
    """Download with torchvision; the reason where that fails."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            if failure := download.with_torchvision("FashionMNIST", Path(scratch), DOWNLOAD_SECONDS):
                return failure
            raw = target / "FashionMNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in _names():
                os.replace(Path(scratch) / "FashionMNIST" / "raw" / name, raw / name)
    except OSError as error:
        return str(error)
    return None


def _apt_install() -> str | None:
    """Install the package, refreshing the package lists if need be; the reason where that fails."""
    limits = ["-o", f"Acquire::http::Timeout={download.CONNECT_SECONDS}", "-o", "DPkg::Lock::Timeout=10"]
    install = ["apt-get", *limits, "install", "-y", "--no-install-recommends", "dataset-fashion-mnist"]
    if download.run(install, APT_SECONDS) is None:
        return None
    return download.run(["apt-get", *limits, "update"], APT_SECONDS) or download.run(install, APT_SECONDS)
