"""A part of the labelled images, the same one every time.

Tests: tests/test_finetune.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    rows = []
    for label in labels.unique():
        members = order[labels[order] == label]
        rows.append(members[: max(1, round(fraction * len(members)))])
    return torch.cat(rows).sort().values
