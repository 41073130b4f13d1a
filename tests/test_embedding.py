"""Maps of features: what t-SNE keeps, which points are shown, and the picture."""

import pytest
import torch

from moco_fast.evaluate.embedding import embed, spread_over_classes
from moco_fast.evaluate.pictures import plot_embedding

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def clusters(classes, each, features, noise=0.05):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes * each) % classes
    centres = torch.randn(classes, features, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), features, generator=generator), labels


def test_neighbours_stay_neighbours():
    """The nearest point on the plane is of the same class; a scale of its own per image changes nothing."""
    features, labels = clusters(4, 15, 70)
    places = embed(features, 0)
    assert places.shape == (60, 2) and places.dtype == torch.float32
    distances = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert torch.equal(labels[distances.argmin(1)], labels)
    assert torch.equal(embed(features, 0), places)
    scaled = embed(features.double() * 2.0 ** (torch.arange(60) % 3)[:, None], 0)
    assert torch.equal(scaled, embed(features.double(), 0))


@pytest.mark.parametrize("features", [torch.randn(5, 1), torch.ones(7, 3), torch.randn(6, 200)])
def test_few_or_equal_features(features):
    assert torch.isfinite(embed(features, 0)).all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(4, 8), r"at least 5 rows, got \(4, 8\)"),
        (torch.randn(9), r"features must be \(N, F\)"),
        (torch.full((6, 2), float("nan")), "features must be finite"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        embed(features, 0)


def test_points_are_spread_over_classes():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    rows = spread_over_classes(labels, 83, 23, 0)
    assert torch.bincount(labels[rows]).tolist() == [10, 10, 3]  # the third has no more
    assert torch.equal(rows, rows.unique()) and torch.equal(rows, spread_over_classes(labels, 83, 23, 0))
    assert not torch.equal(rows, spread_over_classes(labels, 83, 23, 1))
    assert torch.equal(spread_over_classes(labels, 83, 500, 0), torch.arange(83))
    unlabelled = spread_over_classes(None, 83, 23, 0)
    assert len(unlabelled.unique()) == 23 and unlabelled.max() > 50


@pytest.fixture
def quick(monkeypatch):
    """The first two features in place of t-SNE."""
    monkeypatch.setattr("moco_fast.evaluate.pictures.embedding.embed", lambda features, _: features[:, :2])


def test_map(tmp_path, figures, quick):
    features, labels = clusters(3, 10, 6)
    names = ("cat", "dog", "cow", "none of these")
    plot_embedding(features, labels, names, tmp_path / "a.png", 0, "pets, resnet, moco")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["cat", "dog", "cow"]
    assert [len(points.get_offsets()) for points in axes.collections] == [10, 10, 10]
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 3
    assert figures[0].get_suptitle() == "pets, resnet, moco\nt-SNE of 30 images"
    for points, name in zip(axes.collections, axes.texts, strict=True):  # which is at the median
        middle = torch.tensor(points.get_offsets().data).float().median(0).values
        torch.testing.assert_close(torch.tensor(name.get_position()).float(), middle)
        assert tuple(points.get_facecolor()[0][:3]) == name.get_bbox_patch().get_edgecolor()[:3]


def test_names_do_not_overlap(tmp_path, figures, quick):
    features = torch.rand(120, 2, generator=torch.Generator().manual_seed(0))
    plot_embedding(features, torch.arange(120) % 12, [f"class {i}" for i in range(12)], tmp_path / "a.png", 0)
    (axes,) = figures[0].axes
    assert axes.texts[0].get_text() == "● class 0" and axes.texts[11].get_text() == "▲ class 11"
    frames = [name.get_bbox_patch().get_window_extent() for name in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(frames) for b in frames[:i])


def test_map_without_labels_or_with_too_many(tmp_path, figures, quick):
    features, labels = clusters(31, 1, 6)
    plot_embedding(features, None, (), tmp_path / "a.png", 0)
    assert not figures[0].axes[0].texts and len(figures[0].axes[0].collections) == 1
    plot_embedding(features, labels, [str(i) for i in range(31)], tmp_path / "a.png", 0)
    assert not figures[1].axes[0].texts
    assert figures[1].get_suptitle() == "t-SNE of 31 images of 31 classes, too many to name"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"labels must be \(6,\), one per row, got \(5,\)"),
        (torch.tensor([0, 1, 2, 0, 1, 2]), r"labels must be in \[0, 2\), got 0 to 2"),
    ],
)
def test_labels_that_do_not_fit(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_embedding(torch.randn(6, 3), labels, ("a", "b"), tmp_path / "a.png", 0)
