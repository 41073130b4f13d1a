"""Collectives of the default process group, which are the identity without one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def world_size() -> int:
    """Processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_rows(count: int) -> slice:
    """This rank's among the rows of all ranks, ``count`` of each, in rank order."""
    return slice(rank() * count, (rank() + 1) * count)


def all_gather_rows(
    x: Tensor,  # (N, ...), the same N on every rank
) -> Tensor:
    """Rows of all ranks in rank order, (W * N, ...), without gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.detach().contiguous())
    return out


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, same_loss):
        ctx.same_loss, ctx.rows = same_loss, x.shape[0]
        return all_gather_rows(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.same_loss:  # every rank has this gradient: the sum over ranks without a collective
            return grad[own_rows(ctx.rows)] * world_size(), None
        out = grad.new_empty((ctx.rows, *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out, None


def all_gather_rows_with_grad(
    x: Tensor,  # (N, ...), the same N on every rank
    *,
    same_loss: bool,
) -> Tensor:
    """Rows of all ranks in rank order, (W * N, ...), with the gradient of the sum of all ranks' losses.

    A rank's rows get the gradients that every rank's loss has to them, added up. DistributedDataParallel
    divides by W when it averages the gradients of parameters: what is left is the gradient of the mean of the
    ranks' losses, the same as one process with all rows computes, as long as the encoder treats images one
    by one.

    Args:
        x: this rank's rows.
        same_loss: every rank computes the same loss of all rows; the sum is then W times the own gradient,
            and no gradient is exchanged. The other ranks' rows are constants to this one, which changes
            nothing: the gradient to one row does not ask whether another wants one.
    """
    return x if world_size() == 1 else _GatherWithGrad.apply(x, same_loss)


def broadcast_(*tensors: Tensor) -> None:
    """Overwrite the tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            sent = tensor.detach().contiguous()  # NCCL takes nothing else
            dist.broadcast(sent, src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)


def average_(*tensors: Tensor) -> None:
    """Overwrite floating-point tensors with their means over ranks, in one collective."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def local_shards(tensors: Iterable[T]) -> list[T]:
    """What this rank holds of DTensors, as FSDP2 makes of parameters; anything else as it is."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
