"""Collectives that are the identity without a process group, and the batch shuffle built on them.

Source: shuffling BN, He et al. 2020, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather_rows(
    x: Tensor,  # (N, ...), the same N on every rank
) -> Tensor:
    """Rows of all ranks in rank order, (W * N, ...), without gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


def broadcast_(*tensors: Tensor) -> None:
    """Overwrite the tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def encode_shuffled(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,  # (N, ...)
    permutation: Tensor | None,  # (W * N,) the same on every rank, or None for no shuffle
) -> tuple[Tensor, Tensor]:
    """Encode a batch whose rows were exchanged between ranks, and put the keys back in order.

    Batch norm in the key encoder then sees other neighbours than in the query
    encoder, so its statistics cannot tell a positive from a negative.

    Returns:
        keys (N, C) of this rank's images, and those of all ranks in rank order (W * N, C).
    """
    count = images.shape[0]
    own = slice(rank() * count, (rank() + 1) * count)
    if permutation is None:
        keys = all_gather_rows(encode(images))
        return keys[own], keys
    permutation = permutation.to(images.device)
    shuffled = all_gather_rows(encode(all_gather_rows(images)[permutation[own]]))
    keys = torch.empty_like(shuffled)
    keys[permutation] = shuffled
    return keys[own], keys
