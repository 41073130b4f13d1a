"""k-nearest-neighbour accuracy: how well frozen features sort images, with nothing trained.

    sim(a, b) = <a, b> / (|a| |b|)
    votes(c)  = sum over the k nearest neighbours of class c of w,   w = 1 or exp(sim / temperature)

Queries go in blocks and the bank in chunks, so the (M, N) similarities never exist at once. The bank may be
spread over processes: each searches its rows, and what they find is merged.

Tests: tests/test_knn.py, against scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_fast.distributed import all_gather_rows, check_agreement, from_all, rank, world_size
from moco_fast.evaluate.scores import accuracy_at

BLOCK = 1 << 24  # similarities in memory at once: 64 MB
CHUNK = 4000  # rows of the bank that are searched at once; whole batches of feature extraction
TOP = 5  # classes that a prediction ranks


class Neighbours(NamedTuple):
    """The k nearest rows of a bank, nearest first."""

    similarities: Tensor  # (M, k) float32
    indices: Tensor  # (M, k) int64


class Predictions(NamedTuple):
    """The classes that most votes are for, first choice first."""

    classes: Tensor  # (M, 5) int64; -1 beyond the classes that the neighbours have
    votes: Tensor  # (M, 5) float32, in units of the nearest neighbour's; 0 beyond

    def accuracy(self, labels: Tensor, top: int = 1) -> float:
        """Share of rows whose label is among the first ``top`` classes, in [0, 1]."""
        return accuracy_at(self.classes, labels.to(self.classes.device), top)


def nearest_neighbours(
    bank: Tensor,  # (N, F)
    queries: Tensor,  # (M, F)
    k: int,
    *,
    sharded: bool = False,
) -> Neighbours:
    """The ``k`` rows of ``bank`` with the highest cosine similarity to every query.

    Args:
        bank: features to search, any floating dtype.
        queries: features to search for, on the device of ``bank``.
        k: neighbours per query, at most N.
        sharded: ``bank`` holds this process's rows of a bank that all processes share, in rank order, and the
            queries are the same on all of them. So are the results, and exactly those of one process,
            if shards end at multiples of ``CHUNK``.

    Raises:
        ValueError: empty or non-finite features, sizes that do not match, or ``k`` out of range.
    """
    sizes = from_all(len(bank)) if sharded else [len(bank)]
    own = rank() if sharded else 0
    _check(lambda: _check_search(bank, queries, k, sum(sizes)), sharded)
    found = []
    for block in queries.split(max(1, BLOCK // CHUNK)):
        block = F.normalize(block.float(), dim=1)
        near = Neighbours(block.new_empty(len(block), 0), block.new_empty(len(block), 0, dtype=torch.int64))
        for first in range(0, len(bank), CHUNK):
            # No normalised copy of the bank, which on a GPU lies beside the model that is being trained.
            chunk = block @ F.normalize(bank[first : first + CHUNK].float(), dim=1).t()
            best = chunk.topk(min(k, chunk.shape[1]), dim=1)
            near = _merged(near, Neighbours(best.values, best.indices + first + sum(sizes[:own])), k=k)
        found.append(_merged(*_of_all_ranks(near, k), k=k) if sharded and len(sizes) > 1 else near)
    return Neighbours(torch.cat([f.similarities for f in found]), torch.cat([f.indices for f in found]))


def knn_predict(
    train_features: Tensor,  # (N, F)
    train_labels: Tensor,  # (N,) integers
    test_features: Tensor,  # (M, F)
    *,
    k: Sequence[int] = (20,),
    temperature: float | None = 0.1,
    sharded: bool = False,
) -> dict[int, Predictions]:
    """Classes of the test rows by their nearest neighbours' votes, for every ``k``, from one search.

    Of classes with equal votes the one with the nearest neighbour comes first.

    Args:
        train_features: the bank that votes.
        train_labels: labels of the bank.
        test_features: rows to classify.
        k: neighbours that vote, one or several numbers.
        temperature: weights votes by ``exp(sim / temperature)``; None gives every neighbour one vote.
        sharded: as in :func:`nearest_neighbours`; ``train_labels`` are those of the whole bank.

    Raises:
        ValueError: as in :func:`nearest_neighbours`, or labels that do not match the features, no ``k``,
            or a temperature that is not positive.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive or None, got {temperature}")
    if not k:
        raise ValueError("k must hold at least one number of neighbours")
    if min(k) < 1:
        raise ValueError(f"k must be between 1 and the size of the bank, {len(train_labels)}, got {min(k)}")
    if sharded and world_size() > 1:
        total = sum(from_all(len(train_features)))
        if train_labels.shape != (total,):
            raise ValueError(
                f"train_labels must be ({total},), those of all shards, got {tuple(train_labels.shape)}"
            )
    else:
        _check_labels("train", train_features, train_labels)
    near = nearest_neighbours(train_features, test_features, max(k), sharded=sharded)
    labels = train_labels.to(near.indices.device)[near.indices]
    return {neighbours: _vote(near.similarities, labels, neighbours, temperature) for neighbours in k}


def knn_accuracy(
    train_features: Tensor,  # (N, F)
    train_labels: Tensor,  # (N,) integers
    test_features: Tensor,  # (M, F)
    test_labels: Tensor,  # (M,) integers
    *,
    k: int = 20,
    temperature: float | None = 0.1,
) -> float:
    """Share of test rows whose nearest neighbours vote for the right label, in [0, 1].

    Args and errors as for :func:`knn_predict`; ``test_labels`` are the right answers.
    """
    _check_labels("test", test_features, test_labels)
    predicted = knn_predict(train_features, train_labels, test_features, k=(k,), temperature=temperature)
    return predicted[k].accuracy(test_labels)


def extract_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],  # ((B, C, H, W) model inputs, (B,) indices)
    features_of: Callable[[Tensor], Tensor],  # (B, C, H, W) -> (B, F)
    count: int,  # N
) -> tuple[Tensor, Tensor]:
    """Features of every image, in eval mode, without gradients and without a trace.

    Every module gets its own training flag back, also when a batch raises, and the random generators
    continue where they were: evaluating more often does not change what a run computes.

    Args:
        encoder: the model that ``features_of`` runs.
        batches: prepared inputs, on the encoder's device, and the rows of the dataset they are.
        features_of: pooled features before the head.
        count: images in all batches. Features go where they stay: a million fill a GPU once, not twice.

    Returns:
        Features (N, F) float32 on the encoder's device, and indices (N,) on the CPU.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    features: Tensor | None = None
    indices: list[Tensor] = []
    done = 0
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        encoder.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for images, rows in batches:
                found = features_of(images).float()
                if features is None:
                    features = found.new_empty(count, found.shape[1])
                features[done : done + len(rows)] = found
                indices.append(rows.cpu())
                done += len(rows)
    finally:
        for module, training in modes:
            module.training = training
    if features is None:
        raise ValueError("batches is empty: there is nothing to extract features from")
    return features[:done], torch.cat(indices)


def _merged(*lists: Neighbours, k: int) -> Neighbours:
    """The ``k`` nearest of several lists, each nearest first; of equals those of the earlier list.

    Lists of consecutive chunks give the same result in whatever groups they are merged: processes agree
    with one process.
    """
    similarities = torch.cat([near.similarities for near in lists], 1)
    indices = torch.cat([near.indices for near in lists], 1)
    order = similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return Neighbours(similarities.gather(1, order), indices.gather(1, order))


def _of_all_ranks(near: Neighbours, k: int) -> list[Neighbours]:
    """Every rank's neighbours (M, k), in rank order; a shard of fewer than k rows is filled up with -inf."""
    short = k - near.indices.shape[1]
    similarities = all_gather_rows(F.pad(near.similarities, (0, short), value=-torch.inf))
    indices = all_gather_rows(F.pad(near.indices, (0, short)))
    rows = len(near.indices)
    return [Neighbours(*pair) for pair in zip(similarities.split(rows), indices.split(rows), strict=True)]


def _vote(
    similarity: Tensor,  # (M, K), nearest first
    labels: Tensor,  # (M, K)
    k: int,
    temperature: float | None,
) -> Predictions:
    """Classes with the most votes of the first ``k`` neighbours.

    Every neighbour counts the votes of its own class: k * k comparisons instead of a scatter over
    classes, whose order of additions changes between runs on a GPU. The first neighbour of a class
    stands for it.
    """
    similarity, labels = similarity[:, :k], labels[:, :k]
    rows = max(1, BLOCK // (k * k))
    classes = labels.new_full((len(labels), TOP), -1)
    counted = similarity.new_zeros(len(labels), TOP)
    earlier = torch.ones(k, k, dtype=torch.bool, device=labels.device).tril(-1)
    for first in range(0, len(labels), rows):
        part, label = similarity[first : first + rows], labels[first : first + rows]
        weights = torch.ones_like(part)
        if temperature is not None:  # relative to the nearest: exp(1 / temperature) overflows below 0.0113
            weights = ((part - part[:, :1]) / temperature).exp()
        same = label[:, :, None] == label[:, None, :]
        votes = (same * weights[:, None, :]).sum(2)
        votes.masked_fill_((same & earlier).any(2), -1)  # the class is counted already
        ranked = votes.sort(dim=1, descending=True, stable=True)
        best, position = ranked.values[:, :TOP], ranked.indices[:, :TOP]
        classes[first : first + rows, : best.shape[1]] = label.gather(1, position).where(best >= 0, -1)
        counted[first : first + rows, : best.shape[1]] = best.clamp(min=0)
    return Predictions(classes, counted)


def _check(check: Callable[[], None], everywhere: bool) -> None:
    """Run a check; where all processes take part, what one of them finds is raised by all."""
    if not everywhere:
        return check()
    problem = None
    try:
        check()
    except ValueError as error:
        problem = error
    check_agreement({}, problem)


def _check_search(bank: Tensor, queries: Tensor, k: int, size: int) -> None:
    if size == 0 or len(bank):
        _check_features("bank", bank)
    _check_features("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank has {bank.shape[1]} features per row, queries have {queries.shape[1]}")
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the size of the bank, {size}, got {k}")


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"{name} must be (rows, features) and not empty, got shape {tuple(features.shape)}")
    # In chunks: torch.isfinite makes a copy.
    if not torch.stack([torch.isfinite(chunk).all() for chunk in features.split(CHUNK)]).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"{name} must be finite, but {bad} of {len(features)} rows hold inf or nan")


def _check_labels(name: str, features: Tensor, labels: Tensor) -> None:
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name}_labels must have one label per row of {name}_features {tuple(features.shape)}, "
            f"got shape {tuple(labels.shape)}"
        )
