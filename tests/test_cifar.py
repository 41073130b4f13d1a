"""CIFAR from files laid out as torchvision lays them out. Nothing touches the network."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from moco_fast.data import download
from moco_fast.data.datasets import load_dataset

datasets = pytest.importorskip("torchvision.datasets")
EACH = 4  # images per file


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """No download, no copy but the test's own, and files that need no checksum."""

    def forbidden(*_):
        raise AssertionError("a test tried to run a command")

    monkeypatch.setattr(download, "run", forbidden)
    monkeypatch.setattr(download, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("MOCO_FAST_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for cls in (datasets.CIFAR10, datasets.CIFAR100):
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(cls, files, [(name, None) for name, _ in getattr(cls, files)])
        monkeypatch.setattr(cls, "meta", cls.meta | {"md5": None})


def write_cifar(root, cls):
    """Files of four images each; image i of a file is i in every pixel, but red 200 in its first."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    fine = cls is datasets.CIFAR100
    for name, _ in (*cls.train_list, *cls.test_list):
        data = np.repeat(np.arange(EACH, dtype=np.uint8)[:, None], 3072, axis=1)
        data[:, 0] = 200
        labels = {"fine_labels" if fine else "labels": [3, 1, 2, 0]}
        (folder / name).write_bytes(pickle.dumps({"data": data} | labels))
    names = [f"class {i}" for i in range(100 if fine else 10)]
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}))


@pytest.mark.parametrize("where", ["env", "cache", "data"])
@pytest.mark.parametrize(("name", "count"), [("cifar10", 5 * EACH), ("cifar100", EACH)])
def test_found_in_every_place(name, count, where, tmp_path, monkeypatch):
    root = {"env": tmp_path / "mine", "cache": tmp_path / "cache", "data": tmp_path / "cwd" / "data"}[where]
    if where == "env":
        monkeypatch.setenv("MOCO_FAST_DATA", str(root))
    write_cifar(root, getattr(datasets, name.upper()))
    dataset = load_dataset(name, log=pytest.fail)
    assert (dataset.name, dataset.channels, len(dataset.train), len(dataset.test)) == (name, 3, count, EACH)
    pixels = dataset.train.images.pixels
    assert pixels.shape == (count, 3, 32, 32) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert pixels[1, 0, 0, 0] == 200 and (pixels[1].flatten()[1:] == 1).all()  # red, top left
    assert dataset.train.labels[:EACH].tolist() == [3, 1, 2, 0] and dataset.train.labels.dtype == torch.int64
    assert dataset.class_names[:2] == ("class 0", "class 1")
    assert len(dataset.class_names) == (10 if name == "cifar10" else 100)
    assert "found in" in dataset.note


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    lines = []
    with pytest.raises(
        FileNotFoundError, match=r"downloading is off: put cifar-10-python\.tar\.gz from http"
    ):
        load_dataset("cifar10", download=False, log=lines.append)
    assert not lines
    monkeypatch.setattr(download, "run", lambda *_: "no route to host")
    with pytest.raises(FileNotFoundError, match=r"download failed \(no route to host\).*MOCO_FAST_DATA"):
        load_dataset("cifar10", log=lines.append)
    assert str(tmp_path / "cache") in lines[0]


def test_download_arrives_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "run", lambda command, _: write_cifar(tmp_path / "cache", datasets.CIFAR10))
    dataset = load_dataset("cifar10", log=lambda _: None)
    assert str(tmp_path / "cache") in dataset.note


def test_an_archive_is_unpacked(monkeypatch, tmp_path):
    """torchvision unpacks it where its checksum is right; here a stand-in does."""
    root = tmp_path / "cwd" / "data"
    root.mkdir()
    (root / datasets.CIFAR100.filename).write_bytes(b"")
    commands = []

    def run(command, _):
        commands.append(command)
        write_cifar(tmp_path / "cwd" / command[-1], datasets.CIFAR100)

    monkeypatch.setattr(download, "run", run)
    assert load_dataset("cifar100", log=pytest.fail).name == "cifar100"
    assert len(commands) == 1 and "CIFAR100(sys.argv[1], download=True)" in commands[0][2]


def test_damaged_copy_is_named_and_the_next_place_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_FAST_DATA", str(tmp_path / "mine"))
    for root in (tmp_path / "mine", tmp_path / "cache"):
        write_cifar(root, datasets.CIFAR10)
    (tmp_path / "mine" / datasets.CIFAR10.base_folder / "data_batch_3").unlink()
    lines = []
    dataset = load_dataset("cifar10", log=lines.append)
    assert str(tmp_path / "cache") in dataset.note
    assert len(lines) == 1 and str(tmp_path / "mine") in lines[0] and "not usable" in lines[0]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="downloading is off"):
        load_dataset("cifar10", download=False, log=lines.append)


def test_a_name_nearly_right():
    with pytest.raises(FileNotFoundError, match="did you mean cifar10"):
        load_dataset("cifar-10", download=False)
