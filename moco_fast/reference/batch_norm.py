"""Batch normalisation of the parts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast.reference.common import compute_dtype, dense


def split_batch_norm(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    splits: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of S consecutive parts of a batch, each with its own statistics.

    Over the M values that a channel has in part s::

        mean_s = sum(x) / M,    var_s = sum((x - mean_s)^2) / M
        y      = (x - mean_s) / sqrt(var_s + eps) * weight + bias

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1, as S devices do it.

    Returns:
        y, dense as x, in its dtype; mean (S, C) and var (S, C) in that of the arithmetic.
    """
    parts = _parts(x, splits)
    mean = parts.mean((1, 3), keepdim=True)  # (S, 1, C, 1)
    centred = parts - mean
    rest = centred.mean((1, 3), keepdim=True)  # what rounding left, where the mean is large
    mean, centred = mean + rest, centred.sub_(rest)
    var = centred.square().mean((1, 3), keepdim=True)  # on a CPU torch.var_mean takes several times as long
    y = centred * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(y.dtype)[:, None]
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    return torch.empty_like(dense(x)).copy_(y.reshape(x.shape)), mean[:, 0, :, 0], var[:, 0, :, 0]


def split_batch_norm_backward(
    dy: Tensor,  # (N, C, ...)
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    mean: Tensor,  # (S, C)
    var: Tensor,  # (S, C)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`split_batch_norm` to x, weight and bias.

    With ``x^ = (x - mean_s) / sqrt(var_s + eps)`` and sums over the M values of a channel in a part::

        db = sum_s sum(dy),    dw = sum_s sum(dy x^)
        dx = weight / sqrt(var_s + eps) * (dy - sum(dy) / M - x^ sum(dy x^) / M)

    Returns:
        dx, dense as x, in its dtype; dw (C,) and db (C,) in that of the arithmetic.
    """
    parts, grads = _parts(x, len(mean)), _parts(dy, len(mean))
    scale = (var + eps).rsqrt()[:, None, :, None]
    x_hat = (parts - mean[:, None, :, None]) * scale
    dw, db = ((grads * factor).sum((1, 3), keepdim=True) for factor in (x_hat, 1))
    values = parts.shape[1] * parts.shape[3]
    dx = (grads - db / values - x_hat * (dw / values)) * scale
    if weight is not None:
        dx = dx * weight.to(dx.dtype)[:, None]
    dx = torch.empty_like(dense(x)).copy_(dx.reshape(x.shape))
    return dx, dw.sum((0, 1, 3)), db.sum((0, 1, 3))


def _parts(x: Tensor, splits: int) -> Tensor:
    """(N, C, ...) as (S, N/S, C, L) in the dtype of the arithmetic."""
    x = x.to(compute_dtype(x))
    return (x.flatten(2) if x.ndim > 2 else x[..., None]).unflatten(0, (splits, -1))
