"""kNN evaluation against scikit-learn, and feature extraction."""

import math

import numpy as np
import pytest
import ranks
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moco_fast.data.images import Dataset, ImageSet, MemoryImages
from moco_fast.evaluate import features, knn
from moco_fast.evaluate.features import View, all_features, own_features, share
from moco_fast.evaluate.knn import extract_features, knn_accuracy, knn_predict, nearest_neighbours
from moco_fast.evaluate.probe import KnnProbe

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


def test_chunks_of_the_bank_change_nothing(monkeypatch):
    """Also where rows stand twice, in different chunks: the earlier one comes first."""
    bank, queries = clusters(130)[0], clusters(41, seed=3)[0]
    bank = torch.cat([bank, bank])
    cosine = torch.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=2)
    expected = cosine.sort(dim=1, descending=True, stable=True)
    for size in (26, 260):  # of whole fractions: equal rows are then equal to the last bit
        monkeypatch.setattr(knn, "CHUNK", size)
        near = nearest_neighbours(bank, queries, 60)
        assert torch.allclose(near.similarities.double(), expected.values[:, :60], atol=1e-6)
        if size == 26:  # within a chunk topk orders equals as it likes
            assert torch.equal(near.indices, expected.indices[:, :60])


def test_a_search_holds_no_second_bank(monkeypatch):
    """Nor the similarities of all queries to it: on a GPU they would lie beside the model in training."""
    bank, queries = torch.randn(400, 64), torch.randn(200, 64)
    given = {x.untyped_storage().data_ptr() for x in (bank, queries)}

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, result.numel())
            return result

    want = nearest_neighbours(bank, queries, 5)
    monkeypatch.setattr(knn, "CHUNK", 20)
    monkeypatch.setattr(knn, "BLOCK", 20 * 50)
    with Sizes() as sizes:
        found = nearest_neighbours(bank, queries, 5)
    assert 0 < sizes.largest <= 50 * 64  # a block of queries
    assert torch.equal(found.indices, want.indices)


def probe_of(device):
    images = torch.randint(256, (300, 1, 8, 8), dtype=torch.uint8)
    train, test = (
        ImageSet(MemoryImages(images[part], torch.ones(150)), torch.arange(150) % 3)
        for part in (slice(150), slice(150, None))
    )
    noise = Dataset("noise", train, test, ("a", "b", "c"), "")
    return KnnProbe(noise, image_size=8, mean=[0.5], std=[0.2], device=device, k=5, bank=100, workers=0)


def test_the_trainers_search_is_where_the_features_are(monkeypatch, tmp_path):
    """On a GPU: one thread of a CPU takes minutes while all GPUs wait."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    probe = probe_of(torch.device("cpu"))
    assert 0 <= probe.accuracy(None) <= 1
    probe.gallery(nn.Flatten(), tmp_path / "gallery.png")
    assert not [x.shape for x in moved if x.shape[-1] == 64]


@pytest.mark.gpu
def test_the_trainers_search_on_a_gpu_finds_what_it_finds_on_a_cpu():
    torch.manual_seed(0)
    here = probe_of(torch.device("cpu")).accuracy(None)
    torch.manual_seed(0)
    assert probe_of(torch.device("cuda")).accuracy(None) == pytest.approx(here, abs=0.02)
    bank, queries = clusters(257)[0], clusters(101, seed=2)[0]
    want = nearest_neighbours(bank, queries, 20)
    found = nearest_neighbours(bank.cuda(), queries.cuda(), 20)
    assert torch.equal(found.indices.cpu(), want.indices)
    torch.testing.assert_close(found.similarities.cpu(), want.similarities, rtol=0, atol=1e-6)


def test_several_k_from_one_search():
    train, test = clusters(257, 7, seed=1), clusters(101, 7, seed=2)
    predicted = knn_predict(*train, test[0], k=(1, 20, 200))
    assert list(predicted) == [1, 20, 200]
    for k, prediction in predicted.items():
        assert prediction.accuracy(test[1]) == knn_accuracy(*train, *test, k=k)
    assert (predicted[1].classes[:, 1:] == -1).all() and (predicted[1].votes[:, 1:] == 0).all()


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_five_best_classes_are_scikit_learns(temperature):
    train, test = clusters(257, 7, seed=1), clusters(101, 7, seed=2)
    weights = "uniform" if temperature is None else lambda d: np.exp((1 - d) / temperature)
    model = sklearn_neighbors.KNeighborsClassifier(37, metric="cosine", algorithm="brute", weights=weights)
    share = torch.from_numpy(model.fit(*train).predict_proba(test[0]))
    predicted = knn_predict(*train, test[0], k=(37,), temperature=temperature)[37]
    ours = predicted.votes.double() / predicted.votes.double()[:, :1]
    theirs = share.sort(1, descending=True).values[:, :5]
    assert torch.allclose(ours, theirs / theirs[:, :1], atol=1e-4)
    assert (predicted.votes.diff(dim=1) <= 0).all()
    voted = share.gather(1, predicted.classes.clamp(min=0))
    assert torch.allclose(voted.where(predicted.classes >= 0, 0), theirs, atol=1e-6)
    rows = [set(row.tolist()) - {-1} for row in predicted.classes]
    assert all(len(row) == n for row, n in zip(rows, (predicted.classes >= 0).sum(1).tolist(), strict=True))
    hits = [int(label) in row for row, label in zip(rows, test[1], strict=True)]
    assert predicted.accuracy(test[1], 5) == pytest.approx(sum(hits) / len(hits))


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
    if change == {"k": 0}:
        with pytest.raises(ValueError, match="k must hold at least one number"):
            knn_predict(torch.ones(10, 4), torch.zeros(10), torch.ones(5, 4), k=())


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

    features, indices = extract_features(encoder, batches, noisy, 10)
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
        extract_features(encoder, batches, fails, 10)
    assert [m.training for m in encoder.modules()] == modes
    with pytest.raises(ValueError, match="batches is empty"):
        extract_features(encoder, [], encoder, 10)


def test_shares_are_consecutive_and_whole(monkeypatch):
    for count, unit, world in ((0, 5, 3), (4, 5, 3), (23, 5, 3), (23, 5, 1), (60_000, 4000, 8)):
        monkeypatch.setattr(features, "world_size", lambda world=world: world)
        parts = [share(count, unit, r) for r in range(world)]
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        assert all(part.start % unit == 0 for part in parts if part.start < count)
        most = math.ceil(math.ceil(count / unit) / world) * unit
        assert max(part.stop - part.start for part in parts) <= most


def by_neighbours(chunk, batch, duplicate):
    """Predictions from features that the processes share out."""
    knn.CHUNK, features.EVALUATION_BATCH = chunk, batch
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 8))
    pixels, labels = torch.randint(0, 256, (801, 1, 8, 8), dtype=torch.uint8), torch.randint(9, (700,))
    images = ImageSet(MemoryImages(pixels), None)
    view = View(8, [0.3], [0.4], torch.device("cpu"))
    bank = torch.arange(700)
    if duplicate:  # equal similarities across shards
        bank = bank % 350
    own = own_features(network, images, bank, view, chunk)
    queries = all_features(network, images, torch.arange(700, 801), view)
    predicted = knn_predict(own, labels[bank], queries, k=(5, 150), sharded=True)
    near = nearest_neighbours(own, queries, 150, sharded=True)
    return [t.tolist() for t in (*predicted[5], *predicted[150], *near)], len(own)


def on_rank(rank, cases):
    found = [by_neighbours(*case) for case in cases]
    own, labels, queries = torch.ones(10, 4), torch.zeros(20), torch.ones(5, 4)
    messages = []
    for k, bad in ((3, 1), (21, None)):
        shard = own / 0 if rank == bad else own
        try:
            knn_predict(shard, labels, queries, k=(k,), sharded=True)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return found, messages


def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    """Bit for bit: similarities, neighbours, votes. And what is wrong on one rank is raised on all."""
    for module, name in ((knn, "CHUNK"), (features, "EVALUATION_BATCH")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored afterwards
    torch.set_num_threads(1)
    # with chunks of 700 one rank has no bank at all
    cases = [(100, 25, False), (100, 25, True), (700, 25, False)]
    results = ranks.run(2, on_rank, cases, folder=tmp_path)
    for i, case in enumerate(cases):
        alone, count = by_neighbours(*case)
        assert count == 700 == sum(found[i][1] for found, _ in results)
        assert all(found[i][0] == alone for found, _ in results)
    for _, messages in results:
        assert messages == [
            "rank 1: bank must be finite, but 10 of 10 rows hold inf or nan",
            "k must be between 1 and the size of the bank, 20, got 21",
        ]


def test_raw_pixels_are_small_whatever_the_view():
    view = View(224, [0.3] * 3, [0.4] * 3, torch.device("cpu")).raw(20_000)
    assert (view.size, view.mean, view.std) == (64, [0.0] * 3, [1.0] * 3)
    assert View(28, [0.3], [0.4], torch.device("cpu")).raw(60_000).size == 28
    assert View(224, [0.0] * 3, [1.0] * 3, torch.device("cpu")).raw(1_281_167).size == 16  # 3.9 GB
