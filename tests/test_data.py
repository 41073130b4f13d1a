"""Datasets, decoding and the loader. Nothing touches the network: the downloader and apt are replaced."""

import gzip
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from moco_fast.data import fashion_mnist, folder
from moco_fast.data.datasets import load_dataset
from moco_fast.data.decode import decode
from moco_fast.data.folder import FolderImages
from moco_fast.data.images import ImageSet, MemoryImages
from moco_fast.data.loader import BatchLoader, _interrupts_held

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No download, no apt, and no Fashion-MNIST but the test's own."""

    def forbidden(*_):
        raise AssertionError("a test tried to run a command")

    monkeypatch.setattr(fashion_mnist, "_run", forbidden)
    monkeypatch.setattr(fashion_mnist, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 40, "t10k": 20})
    monkeypatch.delenv("MOCO_FAST_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def write_image(path: Path, colour=(200, 30, 60), size=(12, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


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


# Fashion-MNIST and digits


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
    dataset = load_dataset("fashion-mnist", canvas=32, log=pytest.fail)
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
    dataset = load_dataset("fashion-mnist", canvas=32, log=lines.append)
    assert dataset.name == "fashion-mnist" and "debian" in dataset.note
    assert len(lines) == 1 and str(bad) in lines[0]
    assert ("train" if damage == "missing" else victim.name) in lines[0]


def test_mnist_under_the_same_names_is_refused(tmp_path):
    place = write_fashion_mnist(tmp_path / "debian", zipped=False)
    (place / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(40)))
    lines = []
    assert load_dataset("fashion-mnist", canvas=32, download=False, log=lines.append).name == "digits"
    assert "MNIST?" in lines[0]


def test_fallback_to_digits_says_why(monkeypatch):
    commands, lines = [], []
    monkeypatch.setattr(
        fashion_mnist, "_run", lambda command, _: commands.append(command) or "no route to host"
    )
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(fashion_mnist.os, "geteuid", lambda: 0)
    dataset = load_dataset("fashion-mnist", canvas=32, log=lines.append)
    assert dataset.name == "digits" and "in place of Fashion-MNIST" in dataset.note
    text = "\n".join(lines)
    assert (
        "Download failed: no route to host" in text and "apt-get failed" in text and "digits instead" in text
    )
    assert [c[0].rsplit("/", 1)[-1].startswith("python") for c in commands] == [True, False, False]
    assert "update" in commands[2]


def test_no_download_runs_nothing():
    lines = []
    assert load_dataset("fashion-mnist", canvas=32, download=False, log=lines.append).name == "digits"
    assert "downloading is off" in lines[0]


def test_download_arrives_in_the_cache(monkeypatch, tmp_path):
    def run(command, _):
        write_fashion_mnist(Path(command[-1]) / "FashionMNIST" / "raw", zipped=False)

    monkeypatch.setattr(fashion_mnist, "_run", run)
    dataset = load_dataset("fashion-mnist", canvas=32, log=lambda _: None)
    assert dataset.name == "fashion-mnist" and "downloaded" in dataset.note
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["FashionMNIST"]


def test_digits():
    first, second = (load_dataset("digits", canvas=32) for _ in range(2))
    assert (len(first.train), len(first.test), first.channels) == (1437, 360, 1)
    assert first.train.images.pixels.shape[1:] == (1, 8, 8) and first.train.images.pixels.max() == 255
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.equal(first.test.images.pixels, second.test.images.pixels)
    counts = torch.bincount(first.test.labels)
    assert counts.min() >= 35 and counts.max() <= 37


# Folders


def test_class_folders_give_labels_and_a_split(tmp_path):
    for name in ("cat", "dog"):
        for i in range(20):
            write_image(tmp_path / "set" / name / "deeper" / f"{i}.png", (i, 0, 0 if name == "cat" else 255))
    first, second = (load_dataset(tmp_path / "set", canvas=8, log=pytest.fail) for _ in range(2))
    assert first.class_names == ("cat", "dog") and first.channels == 3
    assert len(first.train) == 36 and torch.bincount(first.test.labels).tolist() == [2, 2]
    assert torch.equal(first.test.images.pixels, second.test.images.pixels)
    assert torch.equal(first.train.images.pixels[:, 2, 0, 0] == 255, first.train.labels == 1)
    train_reds = set(
        zip(first.train.images.pixels[:, 0, 0, 0].tolist(), first.train.labels.tolist(), strict=True)
    )
    test_reds = set(
        zip(first.test.images.pixels[:, 0, 0, 0].tolist(), first.test.labels.tolist(), strict=True)
    )
    assert len(train_reds) == 36 and not train_reds & test_reds
    assert torch.allclose(first.train.images.aspect, torch.tensor(1.5))


def test_flat_mixed_and_single_class_folders_have_no_labels(tmp_path):
    flat, mixed, single = tmp_path / "flat", tmp_path / "mixed", tmp_path / "single"
    for i in range(3):
        write_image(flat / f"{i}.png")
        write_image(mixed / "a" / f"{i}.png")
        write_image(mixed / "b" / f"{i}.png")
        write_image(single / "a" / f"{i}.png")
    write_image(mixed / "loose.png")
    for path, count in ((flat, 3), (mixed, 7), (single, 3)):
        dataset = load_dataset(path, canvas=4, log=pytest.fail)
        assert dataset.train.labels is None and dataset.test is None and dataset.class_names == ()
        assert len(dataset.train) == count


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_given_split(held_out, tmp_path):
    for half, count in (("train", 4), (held_out, 2)):
        for name in ("a", "b"):
            for i in range(count):
                write_image(tmp_path / half / name / f"{i}.png")
    write_image(tmp_path / held_out / "unknown" / "0.png")
    lines = []
    dataset = load_dataset(tmp_path, canvas=4, log=lines.append)
    assert (len(dataset.train), len(dataset.test)) == (8, 4) and dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert lines == [f"Left out 1 of 5 images in {tmp_path / held_out}: no such class in training"]


def test_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(FileNotFoundError, match=r"did you mean .*flowers\?"):
        load_dataset(tmp_path / "flowerz", canvas=8)
    with pytest.raises(FileNotFoundError, match="did you mean fashion-mnist"):
        load_dataset("fashion_mnist", canvas=8)


def test_unusable_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_dataset(tmp_path / "file", canvas=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images: it is empty"):
        load_dataset(tmp_path / "empty", canvas=8)
    (tmp_path / "empty" / "a.npy").write_text("x")
    with pytest.raises(ValueError, match=r"holds no images: only 1 \.npy"):
        load_dataset(tmp_path / "empty", canvas=8)
    write_image(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="1 readable image; contrastive learning needs at least 2"):
        load_dataset(tmp_path / "one", canvas=8)
    with pytest.raises(ValueError, match="canvas must be at least 1"):
        load_dataset(tmp_path / "one", canvas=0)


def test_unreadable_files_are_skipped_counted_and_named(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"good{i}.png")
    for i in range(7):
        (tmp_path / f"bad{i}.jpg").write_bytes(b"not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    lines = []
    assert len(load_dataset(tmp_path, canvas=8, log=lines.append).train) == 4
    assert lines[0] == "Skipped 7 image files that cannot be read:" and len(lines) == 7
    assert "bad0.jpg" in lines[1] and lines[-1].endswith("2 more")


def broken_pixels(path: Path) -> Path:
    """A PNG whose header is whole and whose pixels are not."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def test_broken_pixels_are_left_out_when_decoding_once(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png")
    bad = broken_pixels(tmp_path / "bad.png")
    lines = []
    assert len(load_dataset(tmp_path, canvas=8, log=lines.append).train) == 4
    assert lines[0].startswith("Skipped 1 image file ") and str(bad) in lines[1]


def test_linked_folders_are_read_once(tmp_path):
    for i in range(3):
        write_image(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert len(load_dataset(tmp_path / "set", canvas=8).train) == 3


# Decoding


def pixels_of(path: Path, canvas: int = 8) -> torch.Tensor:
    result = decode(str(path), canvas)
    assert not isinstance(result, str), result
    assert result[0].shape == (3, canvas, canvas) and result[0].dtype == np.uint8
    return torch.from_numpy(result[0])


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("LA", (50, 255), "png", (50, 50, 50)),
        ("LA", (50, 0), "png", (255, 255, 255)),  # transparent: white
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("YCbCr", (100, 128, 128), "tif", (100, 100, 100)),
        ("I;16", 257 * 200, "png", (200, 200, 200)),
        ("I;16", 257 * 200, "tif", (200, 200, 200)),
        ("I", 257 * 3, "tif", (3, 3, 3)),
        ("F", 0.2, "tif", (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, suffix, expected, tmp_path):
    path = write_image(tmp_path / f"a.{suffix}", colour, mode=mode)
    assert torch.equal(
        pixels_of(path), torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    )


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 99, 199])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=1)
    assert pixels_of(tmp_path / "a.png")[:, 0, 0].tolist() == [9, 99, 199]
    assert pixels_of(tmp_path / "b.png")[:, 0, 0].tolist() == [255, 255, 255]


def test_deep_pixels_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    row = pixels_of(tmp_path / "a.png", 64)[0, 0].long()
    assert row[0] == 0 and row[-1] == 255 and (row - torch.linspace(0, 255, 64)).abs().max() <= 1
    wild = np.array([[-4.0, 4.0], [np.nan, 0.0]], dtype=np.float32)
    Image.fromarray(wild).save(tmp_path / "b.tif")
    assert pixels_of(tmp_path / "b.tif", 2)[0].tolist() == [[0, 255], [128, 128]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels_of(tmp_path / "a.gif")[:, 3, 3].tolist() == [250, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, suffix, tmp_path):
    from PIL import ImageOps

    blocks = np.array([[0, 80], [160, 240]], dtype=np.uint8).repeat(16, 0).repeat(32, 1)
    image = Image.fromarray(blocks).convert("RGB")  # 64 wide, 32 high
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB").resize((8, 8)))
    pixels, aspect = decode(str(path), 8)
    difference = pixels.transpose(1, 2, 0).astype(int) - expected.astype(int)
    # The middle rows and columns mix neighbours; corners tell the orientation.
    assert np.abs(difference[[0, 0, -1, -1], [0, -1, 0, -1]]).max() <= 6
    assert aspect == (0.5 if orientation >= 5 else 2.0)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (4000, 3000)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_tiny_huge_and_narrow_images(size, suffix, tmp_path):
    path = write_image(tmp_path / f"a.{suffix}", (120, 120, 120), size=size)
    pixels, aspect = decode(str(path), 16)
    assert np.abs(pixels.astype(int) - 120).max() <= 1 and aspect == size[0] / size[1]


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert (pixels_of(tmp_path / "a.png").int() - 127).abs().max() <= 12


def test_undecodable_file_gives_its_reason(tmp_path):
    assert isinstance(decode(str(tmp_path / "nowhere.png"), 8), str)
    assert "truncated" in decode(str(broken_pixels(tmp_path / "a.png")), 8)


# Loader


def numbered(count: int) -> ImageSet:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    return ImageSet(MemoryImages(pixels), None)


def numbered_folder(root: Path, count: int) -> ImageSet:
    paths = [str(write_image(root / f"{i:03}.png", (i, i, i))) for i in range(count)]
    return ImageSet(FolderImages(paths, 4), None)


@pytest.fixture(params=["memory", "folder", "workers"])
def loader(request, tmp_path):
    images = numbered(23) if request.param == "memory" else numbered_folder(tmp_path / "n", 23)
    return BatchLoader(images, 4, seed=7, workers=2 if request.param == "workers" else 0, log=pytest.fail)


def test_epochs_are_permutations_and_resume_where_they_stopped(loader):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    whole = list(loader.batches(3))
    assert len(whole) == len(loader) == 5 and loader.wait_seconds > 0
    indices = torch.cat([b.indices for b in whole])
    assert len(set(indices.tolist())) == 20 and indices.max() < 23
    for batch in whole:
        assert batch.images.dtype == torch.uint8 and torch.equal(
            batch.images[:, 0, 0, 0].long(), batch.indices
        )
    rest = list(loader.batches(3, start=2))
    assert [b.indices.tolist() for b in rest] == [b.indices.tolist() for b in whole[2:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[2:], strict=True))
    assert indices.tolist() != torch.cat([b.indices for b in loader.batches(4)]).tolist()
    assert list(loader.batches(3, start=5)) == []
    assert torch.equal(state, torch.random.get_rng_state())


def test_in_order(loader):
    batches = list(loader.in_order())
    assert (
        torch.cat([b.indices for b in batches]).tolist() == list(range(23)) and len(batches[-1].indices) == 3
    )
    assert [b.indices.tolist() for b in loader.in_order(range(20, 15, -1))] == [[20, 19, 18, 17], [16]]
    with pytest.raises(ValueError, match=r"indices must be in \[0, 23\)"):
        loader.in_order([23])


def test_abandoned_epoch_leaves_no_trace(loader):
    first = next(loader.batches(0))
    assert torch.equal(first.indices, next(loader.batches(0)).indices)


def test_epoch_order_does_not_depend_on_workers(tmp_path):
    images = numbered_folder(tmp_path, 12)
    orders = [[b.indices.tolist() for b in BatchLoader(images, 4, 1, w).batches(0)] for w in (0, 1, 2)]
    assert orders[0] == orders[1] == orders[2]


def test_ranks_share_one_permutation():
    ranks = [BatchLoader(numbered(26), 4, 5, rank=r, world_size=3) for r in range(3)]
    assert {len(r) for r in ranks} == {2}
    seen = [i for r in ranks for b in r.batches(1) for i in b.indices.tolist()]
    assert len(seen) == len(set(seen)) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pixels_do_not_stop_training(workers, tmp_path):
    paths = [str(write_image(tmp_path / f"{i}.png", (i, i, i))) for i in range(4)]
    paths.insert(2, str(broken_pixels(tmp_path / "bad.png")))
    lines = []
    loader = BatchLoader(ImageSet(FolderImages(paths, 4), None), 5, 0, workers, log=lines.append)
    for epoch in range(2):
        (batch,) = loader.batches(epoch)
        assert sorted(batch.indices.tolist()) == [0, 1, 3, 3, 4]  # the next file stands in
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices - (batch.indices > 2).long())
    assert len(lines) == 1 and "bad.png" in lines[0]


def test_folder_without_one_whole_file(tmp_path):
    images = FolderImages([str(broken_pixels(tmp_path / "a.png"))] * 2, 4)
    with pytest.raises(RuntimeError, match=r"no image can be decoded any more; .*a\.png"):
        images.fetch(torch.tensor([0]))


def test_large_folders_are_streamed(tmp_path, monkeypatch):
    for i in range(6):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", size=(6, 3))
    monkeypatch.setattr(folder, "MEMORY_BUDGET", 100)
    dataset = load_dataset(tmp_path, canvas=8, log=pytest.fail)
    assert not dataset.train.images.in_memory and "decoded by the loader" in dataset.note
    batch = next(BatchLoader(dataset.train, 4, 0, workers=1).batches(0))
    assert batch.images.shape == (4, 3, 8, 8) and batch.aspect.tolist() == [2.0] * 4


def test_ctrl_c_while_workers_start_waits_and_is_not_lost():
    handler = signal.getsignal(signal.SIGINT)
    finished = False
    with pytest.raises(KeyboardInterrupt), _interrupts_held():
        signal.raise_signal(signal.SIGINT)
        finished = True
    assert finished and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 24}, "dataset has 23 images, fewer than batch_size=24"),
        ({"batch_size": 12, "world_size": 2}, "batch_size=12 on each of 2 processes"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be in"),
    ],
)
def test_loader_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(numbered(23), **{"batch_size": 4, "seed": 0, **arguments})
    with pytest.raises(ValueError, match="start must be in"):
        next(BatchLoader(numbered(23), 4, 0).batches(0, start=6))
