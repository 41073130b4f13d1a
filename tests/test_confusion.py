"""Confusion matrices: counts, which mistakes are listed, and what is drawn."""

import os

import pytest
import torch

from moco_fast.evaluate.pictures import plot_confusion, plot_embedding, plot_neighbours
from moco_fast.evaluate.pictures.confusion import largest_confusions
from moco_fast.evaluate.scores import accuracy_at, confusion

pytest.importorskip("matplotlib")


def test_confusion_counts_every_pair():
    labels, predicted = torch.randint(7, (200,)), torch.randint(7, (200,))
    want = torch.zeros(7, 7, dtype=torch.int64)
    for true, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        want[true, guess] += 1
    assert torch.equal(confusion(predicted, labels, 7), want)
    assert torch.equal(confusion(predicted[:0], labels[:0], 2), torch.zeros(2, 2, dtype=torch.int64))


def test_accuracy_at():
    predicted = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 0, 1]])
    labels = torch.tensor([0, 0, 0, 1])
    assert [accuracy_at(predicted, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion(torch.tensor([0, 3]), torch.tensor([0, 1]), 3), r"predicted must be in \[0, 3\)"),
        (lambda: confusion(torch.tensor([0, 2]), torch.tensor([-1, 1]), 3), r"labels must be in \[0, 3\)"),
        (lambda: confusion(torch.zeros(2, 1), torch.zeros(2), 3), r"must be \(N,\), got \(2, 1\) and \(2,\)"),
        (lambda: accuracy_at(torch.zeros(2), torch.zeros(2), 1), r"predicted must be \(N, P\)"),
        (lambda: accuracy_at(torch.zeros(2, 3), torch.zeros(2), 0), "k must be at least 1, got 0"),
    ],
)
def test_bad_predictions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


COUNTS = torch.tensor([[8, 2, 0], [0, 0, 0], [5, 1, 4]])  # of the second class there is no image


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_numbers_are_percent_of_the_row(tmp_path, figures):
    plot_confusion(
        COUNTS, ("cat", "dog", "a very long name of an animal"), tmp_path / "c.png", "pets, a model"
    )
    (axes,) = figures[0].axes
    assert texts(axes) == ["80", "20", "50", "10", "40"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 2), (1, 2), (2, 2)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "a very long name …"]
    assert figures[0].get_suptitle() == "pets, a model\n60.00% right"
    shown = torch.from_numpy(axes.images[0].get_array().data)
    torch.testing.assert_close(shown, COUNTS.double() / torch.tensor([[10.0], [1.0], [10.0]]).double())
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_names_that_are_no_text(tmp_path, figures):
    """Class names are names of folders: dollars are no formula, and what is not UTF-8 is spelled out."""
    names = ("$^$", os.fsdecode(b"caf\xe9"), "$x", "a \\ b")
    plot_confusion(torch.eye(4), names, tmp_path / "c.png", "$^$ and $^$")
    plot_confusion(torch.eye(21), (*names, *map(str, range(17))), tmp_path / "d.png", "$^$")
    images = torch.zeros(4, 2, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(4)
    plot_neighbours(images[:, 0], images, labels, labels[:, None].expand(-1, 2), names, tmp_path / "n.png")
    plot_embedding(torch.randn(40, 8), torch.arange(40) % 4, names, tmp_path / "e.png", 0, "$^$")
    assert len(list(tmp_path.iterdir())) == 4
    ticks = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert ticks == [r"\$^\$", r"caf\udce9", r"\$x", r"a \ b"]


def test_of_many_classes_the_largest_confusions_are_listed(tmp_path, figures):
    counts = 20 * torch.eye(21, dtype=torch.int64)
    counts[3, 5], counts[5, 3], counts[20, 0] = 20, 60, 5
    assert [tuple(mistake) for mistake in largest_confusions(counts, 2)] == [(5, 3, 0.75), (3, 5, 0.5)]
    plot_confusion(counts, [f"c{i}" for i in range(21)], tmp_path / "c.png", "many")
    matrix, beside = figures[0].axes
    assert texts(matrix) == []
    assert [text.split() for text in texts(beside)] == [
        ["75%", "c5", "→", "c3"], ["50%", "c3", "→", "c5"], ["20%", "c20", "→", "c0"],
    ]  # fmt: skip
    plot_confusion(torch.eye(21), [f"c{i}" for i in range(21)], tmp_path / "c.png", "many")
    assert texts(figures[1].axes[1]) == ["nothing"]


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        (torch.ones(2, 3), "ab", r"counts must be \(C, C\) and not negative, got shape \(2, 3\)"),
        (torch.tensor([[1, -1], [0, 1]]), "ab", "not negative"),
        (torch.zeros(2, 2), "ab", "counts must hold at least one image"),
        (torch.eye(2), "abc", "class_names must hold 2 names, one per row, got 3"),
    ],
)
def test_bad_counts(counts, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_confusion(counts, names, tmp_path / "c.png", "")
    assert not (tmp_path / "c.png").exists()
