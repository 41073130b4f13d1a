"""k-nearest-neighbour accuracy: how well frozen features sort images, with nothing trained.

    sim(a, b) = <a, b> / (|a| |b|)
    votes(c)  = sum over the k nearest neighbours of class c of w,   w = 1 or exp(sim / temperature)

Queries go in blocks, so the (M, N) similarities never exist at once.

Tests: tests/test_knn.py, against scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 1 << 24  # similarities in memory at once: 64 MB


class Neighbours(NamedTuple):
    """The k nearest rows of a bank, nearest first."""

    similarities: Tensor  # (M, k) float32
    indices: Tensor  # (M, k) int64


def nearest_neighbours(
    bank: Tensor,  # (N, F)
    queries: Tensor,  # (M, F)
    k: int,
) -> Neighbours:
    """The ``k`` rows of ``bank`` with the highest cosine similarity to every query.

    Args:
        bank: features to search, any floating dtype.
        queries: features to search for, on the device of ``bank``.
        k: neighbours per query, at most N.

    Raises:
        ValueError: empty or non-finite features, sizes that do not match, or ``k`` out of range.
    """
    _check_features("bank", bank)
    _check_features("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank has {bank.shape[1]} features per row, queries have {queries.shape[1]}")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be between 1 and the size of the bank, {len(bank)}, got {k}")
    columns = F.normalize(bank.float(), dim=1).t()
    blocks = queries.split(max(1, BLOCK // len(bank)))
    found = [(F.normalize(block.float(), dim=1) @ columns).topk(k, dim=1) for block in blocks]
    return Neighbours(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


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

    Args:
        train_features: the bank that votes.
        train_labels: labels of the bank.
        test_features: rows to classify.
        test_labels: their labels.
        k: neighbours that vote.
        temperature: weights votes by ``exp(sim / temperature)``; None gives every neighbour one vote.
            Of classes with equal votes the one with the nearest neighbour wins.

    Raises:
        ValueError: as in :func:`nearest_neighbours`, or labels that do not match the features, or a
            temperature that is not positive.
    """
    _check_labels("train", train_features, train_labels)
    _check_labels("test", test_features, test_labels)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive or None, got {temperature}")
    near = nearest_neighbours(train_features, test_features, k)
    device = near.indices.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    rows = max(1, BLOCK // (k * k))
    right = torch.zeros((), dtype=torch.int64, device=device)
    for similarity, index, label in zip(*(t.split(rows) for t in (*near, test_labels)), strict=True):
        right += (_vote(similarity, train_labels[index], temperature) == label).sum()
    return right.item() / len(test_labels)


def extract_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],  # ((B, C, H, W) model inputs, (B,) indices)
    features_of: Callable[[Tensor], Tensor],  # (B, C, H, W) -> (B, F)
) -> tuple[Tensor, Tensor]:
    """Features of every image, in eval mode, without gradients and without a trace.

    Every module gets its own training flag back, also when a batch raises, and the random generators
    continue where they were: evaluating more often does not change what a run computes.

    Args:
        encoder: the model that ``features_of`` runs.
        batches: prepared inputs, on the encoder's device, and the rows of the dataset they are.
        features_of: pooled features before the head.

    Returns:
        Features (N, F) float32 on the encoder's device, and indices (N,) on the CPU.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    features, indices = [], []
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        encoder.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for images, rows in batches:
                features.append(features_of(images).float())
                indices.append(rows.cpu())
    finally:
        for module, training in modes:
            module.training = training
    if not features:
        raise ValueError("batches is empty: there is nothing to extract features from")
    return torch.cat(features), torch.cat(indices)


def _vote(
    similarity: Tensor,  # (M, k), nearest first
    labels: Tensor,  # (M, k)
    temperature: float | None,
) -> Tensor:  # (M,)
    """Label with the most votes.

    Every neighbour counts the votes of its own class: k * k comparisons instead of a scatter over
    classes, whose order of additions changes between runs on a GPU.
    """
    if temperature is None:
        weights = torch.ones_like(similarity)
    else:  # relative to the nearest neighbour: exp(1 / temperature) overflows below 0.0113
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
    same = labels[:, :, None] == labels[:, None, :]
    votes = (same * weights[:, None, :]).sum(2)
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    winner = position.where(votes == votes.amax(1, keepdim=True), labels.shape[1]).amin(1)
    return labels.gather(1, winner[:, None])[:, 0]


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"{name} must be (rows, features) and not empty, got shape {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(1).sum())
        raise ValueError(f"{name} must be finite, but {bad} of {len(features)} rows hold inf or nan")


def _check_labels(name: str, features: Tensor, labels: Tensor) -> None:
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{name}_labels must have one label per row of {name}_features {tuple(features.shape)}, "
            f"got shape {tuple(labels.shape)}"
        )
