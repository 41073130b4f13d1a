"""Rows on the move: into the queue, and into another order."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast.reference.common import compute_dtype, empty_rows, flat_rows, normalise


def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,) int64
    keys: Tensor,  # (N, C), raw, N <= K
    mirror: Tensor | None = None,  # (K, C)
    order: Tensor | None = None,  # (N,) int64
) -> None:
    """Write the normalised keys in ``order`` to rows ``ptr, ptr + 1, ...`` modulo K, advance ``ptr``."""
    slots, count = queue.shape[0], keys.shape[0]
    if order is not None:
        keys = keys.index_select(0, order)
    rows, _ = normalise(keys.to(compute_dtype(queue, keys)))
    index = (ptr + torch.arange(count, device=queue.device)) % slots
    queue.index_copy_(0, index, rows.to(queue.dtype))
    if mirror is not None:
        mirror.index_copy_(0, index, rows.to(mirror.dtype))
    ptr.copy_((ptr + count) % slots)


def take_rows(
    x: Tensor,  # (R, ...)
    index: Tensor,  # (M,) int64
) -> Tensor:
    """``x[index]``, (M, ...), in the memory format of ``x``."""
    out = empty_rows(x, index.shape[0])
    torch.index_select(flat_rows(x), 0, index, out=flat_rows(out))
    return out
