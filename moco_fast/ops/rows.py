"""Rows on the move: into the queue, and into another order."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import backends, checks


@torch.no_grad()
def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,) int64
    keys: Tensor,  # (N, C)
    mirror: Tensor | None = None,  # (K, C)
) -> None:
    """Overwrite the oldest rows of the queue with new keys: ``queue[(ptr + i) % K] <- keys[i] / |keys[i]|``.

    Then ``ptr <- (ptr + N) % K``, on the device. Any N up to K; wraps round.
    Source: He et al. 2020, "Momentum Contrast", section 3.2.

    Args:
        queue: ring buffer, written in place.
        ptr: next slot to write, in [0, K).
        keys: not normalised, any floating dtype.
        mirror: the same rows in another dtype, written too: a 16-bit copy halves what a GPU's loss reads.

    Raises:
        TypeError: not floating-point tensors, or ptr is not int64 of shape (1,).
        ValueError: widths or devices do not match, no keys, more keys than slots, a mirror of
            another shape, queue or mirror requires grad,
            a ptr on the CPU outside [0, K).
    """
    _enqueue_(*checks.enqueue(queue, ptr, keys, mirror))


@torch.library.custom_op("moco_fast::enqueue_", mutates_args=("queue", "ptr", "mirror"))
def _enqueue_(queue: Tensor, ptr: Tensor, keys: Tensor, mirror: Tensor | None) -> None:
    if ptr.device.type == "cpu" and not 0 <= ptr.item() < queue.shape[0]:
        raise ValueError(f"ptr must be in [0, {queue.shape[0]}), got {ptr.item()}")
    if keys.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr():
        keys = keys.clone()  # rows of the queue itself, which would be overwritten while they are read
    backends.choose("enqueue_", (queue, keys)).enqueue_(queue, ptr, keys, mirror)
