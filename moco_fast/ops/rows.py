"""Rows on the move: into the queue, and into another order."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import backends, checks, reference
from moco_fast.ops import arguments, library


@torch.no_grad()
def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,) int64
    keys: Tensor,  # (N, C)
    mirror: Tensor | None = None,  # (K, C)
    order: Tensor | None = None,  # (N,) int64
) -> None:
    """Overwrite the oldest rows of the queue with new keys: ``queue[(ptr + i) % K] <- keys[i] / |keys[i]|``.

    Then ``ptr <- (ptr + N) % K``, on the device. Any N up to K; wraps round.
    Source: He et al. 2020, "Momentum Contrast", section 3.2.

    Args:
        queue: ring buffer (K, C), written in place.
        ptr: (1,) int64, next slot to write, in [0, K).
        keys: (N, C), not normalised, any floating dtype.
        mirror: (K, C), the same rows in another dtype, written too: a 16-bit copy halves what a GPU's loss
            reads.
        order: (N,) int64, row of ``keys`` to write i-th, for keys that a batch shuffle left in another order.

    Raises:
        TypeError: not floating-point tensors, or ptr is not int64 of shape (1,).
        ValueError: widths or devices do not match, no keys, more keys than slots, a mirror or an order of
            another shape, queue or mirror requires grad,
            a ptr on the CPU outside [0, K), an order on the CPU with a number outside [0, N).
    """
    _enqueue_(*arguments.enqueue(queue, ptr, keys, mirror, order))


@torch.no_grad()
def take_rows(
    x: Tensor,  # (R, ...)
    index: Tensor,  # (M,) int64
) -> Tensor:
    """``x[index]`` in one pass over whatever a row holds: images of any dtype, contiguous or channels_last.

    What packs a batch for an exchange between ranks, and brings rows back into order. Without gradient.

    Args:
        x: rows (R, ...), of any dtype; other memory formats are made contiguous first.
        index: (M,) int64, rows to take, in [0, R); any number of them, with or without repetition.

    Returns:
        (M, ...), in the memory format of ``x``.

    Raises:
        TypeError: not tensors, or index is not int64 of one dimension.
        ValueError: no rows, devices differ, an index on the CPU outside [0, R).
    """
    return _take_rows(*arguments.take_rows(x, index))


@library.op("enqueue_", mutates=("queue", "ptr", "mirror"))
def _enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor, mirror: Tensor | None, order: Tensor | None) -> None:
    if ptr.device.type == "cpu" and not 0 <= ptr.item() < queue.shape[0]:
        raise ValueError(f"ptr must be in [0, {queue.shape[0]}), got {ptr.item()}")
    if order is not None:
        checks.in_range("order", order, keys.shape[0])
    if keys.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr():
        keys = keys.clone()  # rows of the queue itself, which would be overwritten while they are read
    backends.choose("enqueue_", (queue, keys)).enqueue_(queue, ptr, keys, mirror, order)


@library.op("take_rows")
def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    checks.in_range("index", index, x.shape[0])
    x = reference.dense(x)
    return backends.choose("take_rows", (x, index)).take_rows(x, index)


@library.fake(_take_rows)
def _(x, index):
    return reference.empty_rows(x, index.shape[0])
