"""The loader: order, resuming, workers, broken files."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import broken_pixels, write_image

from moco_fast.data import folder
from moco_fast.data.datasets import load_dataset
from moco_fast.data.folder import FolderImages
from moco_fast.data.images import ImageSet, MemoryImages
from moco_fast.data.loader import BatchLoader, _interrupts_held


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


def test_another_image_of_the_class_stands_in(tmp_path):
    """What is made of it is taken for the one that was asked for; after the last comes the first."""
    paths = [write_image(tmp_path / f"{i}.png", (i, i, i)) for i in range(6)]
    for broken in (2, 5):
        broken_pixels(paths[broken])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    images = FolderImages([str(path) for path in paths], 4, labels)
    for source in (images, images.subset(torch.arange(6))):
        fetched = source.fetch(torch.arange(6))
        assert fetched.indices.tolist() == [0, 1, 0, 3, 4, 3]
        assert torch.equal(fetched.images[:, 0, 0, 0].long(), fetched.indices)
        assert [index for index, _ in fetched.broken] == [2, 5]
    alone = FolderImages([str(path) for path in paths], 4, torch.tensor([0, 0, 1, 0, 0, 0]))
    assert alone.fetch(torch.tensor([2, 5])).indices.tolist() == [0, 0]  # no other is of its class
    without = FolderImages([str(path) for path in paths], 4)
    assert without.fetch(torch.tensor([2, 5])).indices.tolist() == [3, 0]


def test_folder_without_one_whole_file(tmp_path):
    images = FolderImages([str(broken_pixels(tmp_path / "a.png"))] * 2, 4)
    with pytest.raises(OSError, match=r"no image can be decoded any more; .*a\.png"):
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


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_an_error_in_a_worker_ends_the_process(method):
    """Workers ignore SIGTERM, which Python sends them at its end, to wait for them then.

    They are forked whatever Python's default is: no other way could give them a class of this program.
    """
    if sys.platform != "linux":
        pytest.skip("workers are forked on Linux alone")
    program = (
        f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
        "import torch\nfrom moco_fast.data.images import Fetched, ImageSet\n"
        "from moco_fast.data.loader import BatchLoader\n"
        "class Source:\n"
        "    channels, in_memory = 1, False\n"
        "    def __len__(self): return 64\n"
        "    def name_of(self, index): return str(index)\n"
        "    def fetch(self, indices):\n"
        "        if 40 in indices: raise RuntimeError('the disk is gone')\n"
        "        return Fetched(torch.zeros(len(indices), 1, 4, 4, dtype=torch.uint8), None, indices, ())\n"
        "for _ in BatchLoader(ImageSet(Source(), None), 4, 0, 2).batches(0): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the disk is gone" in done.stderr
