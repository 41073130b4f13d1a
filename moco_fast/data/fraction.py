"""Parts of the labelled images that take alike from every class, the same ones every time.

Tests: tests/test_finetune.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turns(
    labels: Tensor,  # (N,) integers
    order: Tensor,  # (N,) int64, of all rows
) -> Tensor:
    """How many rows of its class come before a row in ``order``, (N,) int64."""
    by_class = order[labels[order].argsort(stable=True)]
    _, counts = labels[by_class].unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    result = torch.empty_like(order)
    result[by_class] = torch.arange(len(order)) - first
    return result


def labelled_fraction(
    labels: Tensor,  # (N,) integers
    fraction: float,
    seed: int,
) -> Tensor:
    """Rows of ``fraction`` of every class, rounded, but at least one image; sorted, (M,) int64.

    Those of a smaller fraction are among those of a larger one, for the same seed.

    Raises:
        ValueError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"labels_fraction must be in (0, 1], got {fraction}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    quota = (fraction * labels.bincount().double()).round().clamp(min=1)
    return (turns(labels, order) < quota[labels]).nonzero()[:, 0]
