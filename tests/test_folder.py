"""Folders of images: labels, splits, and files that cannot be read."""

import os

import pytest
import torch
from images import broken_pixels, write_image

from moco_fast.data.datasets import load_dataset
from moco_fast.evaluate.features import labels_missing


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
    no_folders = "no labels, for it has no two class folders"
    loose = "no labels, for it has images beside the class folders, such as loose.png"
    for path, count, note in ((flat, 3, no_folders), (mixed, 7, loose), (single, 3, no_folders)):
        dataset = load_dataset(path, canvas=4, log=pytest.fail)
        assert note in dataset.note
        assert dataset.train.labels is None and dataset.test is None and dataset.class_names == ()
        assert len(dataset.train) == count


def test_classes_too_small_to_hold_one_out(tmp_path):
    for i in range(8):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png")
    dataset = load_dataset(tmp_path, canvas=4, log=pytest.fail)
    assert len(dataset.train) == 8 and dataset.test is None
    assert "no class has 5 images to hold one out" in dataset.note
    assert labels_missing(dataset).startswith("no images are held out")


@pytest.mark.parametrize(
    ("train", "held_out"), [("train", "val"), ("train", "test"), ("Train", "Valid"), ("TRAIN", "validation")]
)
def test_given_split(train, held_out, tmp_path):
    for half, count in ((train, 4), (held_out, 2)):
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


def test_a_pipe_is_not_waited_for(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png")
    os.mkfifo(tmp_path / "pipe.png")
    lines = []
    assert len(load_dataset(tmp_path, canvas=8, log=lines.append).train) == 4
    assert lines[0].startswith("Skipped 1 image file ") and "pipe.png: a pipe" in lines[1]


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
