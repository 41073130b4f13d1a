"""Public op of batch norms: parts of a batch normalised as several devices would do it."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import backends, reference
from moco_fast.ops import arguments, library


def split_batch_norm(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    splits: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``splits`` consecutive parts of a batch, each with its own statistics, fused.

    ``y = (x - mean_s) / sqrt(var_s + eps) * weight + bias`` with the mean and the biased variance of each
    channel over the part s that a sample is in: what ``splits`` devices get with a part of the batch each.
    Neither parts nor their results are copied; arithmetic is in fp32.
    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1; He et al. 2020, "Momentum Contrast",
    section 3.3.

    Args:
        x: (N, C, ...), fp32, bf16, fp16 or float64; contiguous or channels-last, or else it is copied.
        weight: (C,), float32 or of the dtype of x; None for ones.
        bias: (C,), the same; None for zeros.
        splits: S, a divisor of N.
        eps: added to the variance; finite and at least 0.

    Returns:
        y in the dtype and memory format of x, and without gradient mean (S, C) and var (S, C) in fp32
        (float64 for float64 inputs). y can be differentiated once; a second derivative raises.

    Raises:
        TypeError: not a floating-point tensor, weight or bias of another dtype.
        ValueError: shapes or devices do not match, ``splits`` does not divide the batch, a part has only one
            value per channel, a bad eps.

    Example:
        >>> y, mean, var = moco_fast.split_batch_norm(x, bn.weight, bn.bias, splits=8)
    """
    return _split_batch_norm(*arguments.split_batch_norm(x, weight, bias, splits, eps))


@library.op("split_batch_norm_backward")
def _split_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    forced: str | None,  # what was at the forward pass, "" for nothing; None: what is now
) -> tuple[Tensor, Tensor, Tensor]:
    name = backends.forced() if forced is None else forced
    backend = backends.choose_as(name, "split_batch_norm", (x, dy))
    return backend.split_batch_norm_backward(dy, x, weight, mean, var, eps)


@library.fake(_split_batch_norm_backward)
def _(dy, x, weight, mean, var, eps, forced):
    dw, db = (mean.new_empty((x.shape[1],)) for _ in range(2))
    return torch.empty_like(reference.dense(x)), dw, db


def _save(ctx, arguments, results):
    x, weight, bias, _, ctx.eps = arguments
    # Compiled functions outlive processes, which force one backend or another: they choose when they run.
    ctx.forced = None if torch.compiler.is_compiling() else backends.forced() or ""
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *results[1:])


def _gradients(ctx, saved, dy):
    x, weight, mean, var = saved
    dx, dw, db = _split_batch_norm_backward(dy, x, weight, mean, var, ctx.eps, ctx.forced)
    dw = None if weight is None else dw.to(weight.dtype)
    return dx, dw, None if ctx.bias_dtype is None else db.to(ctx.bias_dtype), None, None


@library.op("split_batch_norm", save=_save, gradients=_gradients)
def _split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.choose("split_batch_norm", (x,)).split_batch_norm(x, weight, bias, splits, eps)


@library.fake(_split_batch_norm)
def _(x, weight, bias, splits, eps):
    mean, var = (x.new_empty((splits, x.shape[1]), dtype=reference.compute_dtype(x)) for _ in range(2))
    return torch.empty_like(reference.dense(x)), mean, var
