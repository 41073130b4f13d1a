"""Fashion-MNIST and digits. Nothing touches the network: the downloader and apt are replaced."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_fast.data import download, fashion_mnist
from moco_fast.data.datasets import load_dataset

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No download, no apt, and no Fashion-MNIST but the test's own."""

    def forbidden(*_):
        raise AssertionError("a test tried to run a command")

    monkeypatch.setattr(download, "run", forbidden)
    monkeypatch.setattr(download, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 40, "t10k": 20})
    monkeypatch.delenv("MOCO_FAST_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion_mnist(place: Path, *, zipped: bool = True) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for half, count in fashion_mnist.COUNTS.items():
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for name, array in ((f"{half}-images-idx3-ubyte", images), (f"{half}-labels-idx1-ubyte", labels)):
            data = idx_bytes(array)
            if zipped:
                (place / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (place / name).write_bytes(data)
    return place


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["env", "cache", "torchvision", "data", "debian"])
def test_fashion_mnist_is_found_in_every_place(where, zipped, tmp_path, monkeypatch):
    place = {
        "env": tmp_path / "mine",
        "cache": tmp_path / "cache" / "fashion-mnist",
        "torchvision": tmp_path / "cache" / "FashionMNIST" / "raw",
        "data": tmp_path / "cwd" / "data" / "FashionMNIST" / "raw",
        "debian": tmp_path / "debian",
    }[where]
    if where == "env":
        monkeypatch.setenv("MOCO_FAST_DATA", str(place))
    write_fashion_mnist(place, zipped=zipped)
    dataset = load_dataset("fashion-mnist", log=pytest.fail)
    assert (dataset.name, dataset.channels, len(dataset.train), len(dataset.test)) == (
        "fashion-mnist",
        1,
        40,
        20,
    )
    assert dataset.train.images.pixels.shape == (40, 1, 28, 28)
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    assert torch.equal(dataset.train.images.pixels[:, 0], torch.from_numpy(expected).to(torch.uint8))
    assert dataset.train.labels.tolist() == [i % 10 for i in range(40)]
    assert len(dataset.class_names) == 10 and "found in" in dataset.note


@pytest.mark.parametrize("damage", ["truncated gz", "truncated idx", "magic", "not gzip", "missing"])
def test_broken_copy_is_named_and_the_next_place_serves(damage, tmp_path, monkeypatch):
    bad = write_fashion_mnist(tmp_path / "mine", zipped=damage in ("truncated gz", "not gzip", "missing"))
    victim = next(bad.glob("train-images*"))
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({
            "truncated gz": data[: len(data) // 2],
            "truncated idx": data[:-7],
            "magic": b"\1" + data[1:],
            "not gzip": b"<html>not here</html>",
        }[damage])  # fmt: skip
    monkeypatch.setenv("MOCO_FAST_DATA", str(bad))
    write_fashion_mnist(tmp_path / "debian")
    lines = []
    dataset = load_dataset("fashion-mnist", log=lines.append)
    assert dataset.name == "fashion-mnist" and "debian" in dataset.note
    assert len(lines) == 1 and str(bad) in lines[0]
    assert ("train" if damage == "missing" else victim.name) in lines[0]


def test_mnist_under_the_same_names_is_refused(tmp_path):
    place = write_fashion_mnist(tmp_path / "debian", zipped=False)
    (place / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(40)))
    lines = []
    assert load_dataset("fashion-mnist", download=False, log=lines.append).name == "digits"
    assert "MNIST?" in lines[0]


def test_fallback_to_digits_says_why(monkeypatch):
    commands, lines = [], []
    monkeypatch.setattr(download, "run", lambda command, _: commands.append(command) or "no route to host")
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 0)
    dataset = load_dataset("fashion-mnist", log=lines.append)
    assert dataset.name == "digits" and "in place of Fashion-MNIST" in dataset.note
    text = "\n".join(lines)
    assert (
        "Download failed: no route to host" in text and "apt-get failed" in text and "digits instead" in text
    )
    assert [c[0].rsplit("/", 1)[-1].startswith("python") for c in commands] == [True, False, False]
    assert "update" in commands[2]


def test_no_download_runs_nothing():
    lines = []
    assert load_dataset("fashion-mnist", download=False, log=lines.append).name == "digits"
    assert "downloading is off" in lines[0]


def test_download_arrives_in_the_cache(monkeypatch, tmp_path):
    def run(command, _):
        write_fashion_mnist(Path(command[-1]) / "FashionMNIST" / "raw", zipped=False)

    monkeypatch.setattr(download, "run", run)
    dataset = load_dataset("fashion-mnist", log=lambda _: None)
    assert dataset.name == "fashion-mnist" and "downloaded" in dataset.note
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["FashionMNIST"]


def test_digits():
    first, second = (load_dataset("digits") for _ in range(2))
    assert (len(first.train), len(first.test), first.channels) == (1437, 360, 1)
    assert first.train.images.pixels.shape[1:] == (1, 8, 8) and first.train.images.pixels.max() == 255
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.equal(first.test.images.pixels, second.test.images.pixels)
    counts = torch.bincount(first.test.labels)
    assert counts.min() >= 35 and counts.max() <= 37
