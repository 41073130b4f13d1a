"""How often classes are predicted rightly, and which are taken for which.

Tests: tests/test_confusion.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import checks


def accuracy_at(
    predicted: Tensor,  # (N, P) integers, best guess first
    labels: Tensor,  # (N,) integers
    k: int,
) -> float:
    """Share of rows whose label is among the first ``k`` guesses, in [0, 1].

    With fewer than k classes, P < k and all guesses count.

    Raises:
        ValueError: shapes that do not match, no rows, or ``k`` < 1.
    """
    if predicted.ndim != 2 or predicted.numel() == 0 or labels.shape != predicted.shape[:1]:
        raise ValueError(
            "predicted must be (N, P) and not empty, labels (N,), "
            f"got {tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return (predicted[:, :k] == labels[:, None]).any(1).double().mean().item()


def confusion(
    predicted: Tensor,  # (N,) integers
    labels: Tensor,  # (N,) integers
    classes: int,
) -> Tensor:
    """Counts (classes, classes) int64: rows are the true classes, columns the predicted ones.

    Raises:
        ValueError: shapes that do not match, or a class out of range.
    """
    if predicted.ndim != 1 or labels.shape != predicted.shape:
        raise ValueError(
            f"predicted and labels must be (N,), got {tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    for name, values in (("predicted", predicted), ("labels", labels)):
        checks.in_range(name, values, classes, wait=True)
    pairs = labels.long() * classes + predicted.long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
