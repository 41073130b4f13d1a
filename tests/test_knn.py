"""kNN evaluation against scikit-learn, and feature extraction."""

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.evaluate import knn
from moco_fast.evaluate.knn import extract_features, knn_accuracy, nearest_neighbours

sklearn_neighbors = pytest.importorskip("sklearn.neighbors")


def clusters(count: int, classes: int = 2, features: int = 9, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=rng)
    return centres[labels] + 1.5 * torch.randn(count, features, generator=rng), labels


def sklearn_accuracy(train, train_labels, test, test_labels, k, weights):
    model = sklearn_neighbors.KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    return model.fit(train.double().numpy(), train_labels).score(test.double().numpy(), test_labels)


@pytest.mark.parametrize("k", [1, 5, 37])
def test_majority_vote_is_scikit_learns(k):
    train, test = clusters(257, seed=1), clusters(101, seed=2)  # two classes and odd k: no ties
    accuracy = knn_accuracy(*train, *test, k=k, temperature=None)
    assert accuracy == pytest.approx(sklearn_accuracy(*train, *test, k, "uniform"))
    assert 0.5 < accuracy < 1.0


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 20, 257])
def test_weighted_vote_is_scikit_learns(k, temperature):
    train, test = clusters(257, 5, seed=1), clusters(101, 5, seed=2)
    accuracy = knn_accuracy(*train, *test, k=k, temperature=temperature)
    expected = sklearn_accuracy(*train, *test, k, lambda d: np.exp((1 - d) / temperature))
    assert accuracy == pytest.approx(expected)


def test_small_blocks_change_nothing(monkeypatch):
    train, test = clusters(257, 5, seed=1), clusters(101, 5, seed=2)
    near, accuracy = nearest_neighbours(train[0], test[0], 20), knn_accuracy(*train, *test)
    monkeypatch.setattr(knn, "BLOCK", 1000)
    blocked = nearest_neighbours(train[0], test[0], 20)
    assert torch.equal(near.indices, blocked.indices)
    assert torch.allclose(near.similarities, blocked.similarities, atol=1e-6)
    assert knn_accuracy(*train, *test) == accuracy


def test_neighbours_are_the_nearest_in_order():
    bank, queries = clusters(100)[0], clusters(7, seed=3)[0]
    near = nearest_neighbours(bank, queries, 10)
    cosine = torch.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=2)
    expected = cosine.sort(dim=1, descending=True)
    assert torch.equal(near.indices, expected.indices[:, :10])
    assert torch.allclose(near.similarities.double(), expected.values[:, :10], atol=1e-6)
    assert torch.equal(nearest_neighbours(bank, 5 * queries, 10).indices, near.indices)


@pytest.mark.parametrize("labels", [[3, 3, 8, 8], [8, 8, 3, 3], [3, 8, 8, 3], [8, 3, 3, 8]])
def test_nearer_neighbour_wins_ties(labels):
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    arguments = (bank, torch.tensor(labels), query, torch.tensor(labels[:1]))
    assert knn_accuracy(*arguments, k=4, temperature=None) == 1.0


def test_small_temperature_does_not_overflow():
    train, test = clusters(257, 5, seed=1), clusters(101, 5, seed=2)
    assert knn_accuracy(*train, *test, k=20, temperature=1e-6) == knn_accuracy(
        *train, *test, k=1, temperature=None
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    train, test = clusters(257), clusters(101, seed=2)
    exact = knn_accuracy(*train, *test)
    assert abs(knn_accuracy(train[0].to(dtype), train[1], test[0].to(dtype), test[1]) - exact) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 11}, "k must be between 1 and the size of the bank, 10, got 11"),
        ({"k": 0}, "k must be between 1 .* got 0"),
        ({"temperature": 0.0}, "temperature must be positive or None, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"train_features": torch.zeros(0, 4), "train_labels": torch.zeros(0)}, "bank must be .* not empty"),
        ({"test_features": torch.zeros(0, 4), "test_labels": torch.zeros(0)}, "queries must be .* not empty"),
        ({"train_labels": torch.zeros(9)}, "train_labels must have one label per row"),
        ({"test_labels": torch.zeros(5, 2)}, "test_labels must have one label per row"),
        ({"test_features": torch.zeros(5, 3)}, "bank has 4 features per row, queries have 3"),
        ({"test_features": torch.full((5, 4), torch.nan)}, "queries must be finite, but 5 of 5 rows"),
        ({"train_features": torch.full((10, 4), torch.inf)}, "bank must be finite"),
    ],
)
def test_errors(change, message):
    arguments = {
        "train_features": torch.ones(10, 4),
        "train_labels": torch.zeros(10),
        "test_features": torch.ones(5, 4),
        "test_labels": torch.zeros(5),
        "k": 3,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})


def encoder_and_batches():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout())
    encoder[2].eval()  # a frozen batch norm must stay frozen, and only that
    images = torch.randn(10, 3, 2, 2)
    return encoder, [(images[i : i + 4], torch.arange(i, min(i + 4, 10))) for i in range(0, 10, 4)]


def test_extract_features_leaves_no_trace():
    encoder, batches = encoder_and_batches()
    modes = [m.training for m in encoder.modules()]
    state = torch.random.get_rng_state()
    buffers = {name: value.clone() for name, value in encoder.state_dict().items()}

    def noisy(images):
        assert not any(m.training for m in encoder.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        return encoder(images).bfloat16()

    features, indices = extract_features(encoder, batches, noisy)
    assert features.shape == (10, 5) and features.dtype == torch.float32 and not features.requires_grad
    assert indices.tolist() == list(range(10))
    assert [m.training for m in encoder.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(buffers[name], value) for name, value in encoder.state_dict().items())


def test_extract_features_restores_modes_after_an_error():
    encoder, batches = encoder_and_batches()
    modes = [m.training for m in encoder.modules()]

    def fails(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        extract_features(encoder, batches, fails)
    assert [m.training for m in encoder.modules()] == modes
    with pytest.raises(ValueError, match="batches is empty"):
        extract_features(encoder, [], encoder)
