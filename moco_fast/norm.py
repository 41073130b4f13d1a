"""Batch normalisation over parts of a batch: one device standing for several."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_fast import backends, checks, reference


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
        x: fp32, bf16, fp16 or float64; contiguous or channels-last, or else a contiguous copy is made.
        weight: float32 or of the dtype of x; None for ones.
        bias: the same; None for zeros.
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
    y, mean, var = _split_batch_norm(*checks.split_batch_norm(x, weight, bias, splits, eps))
    return y, mean.detach(), var.detach()


@torch.library.custom_op("moco_fast::split_batch_norm", mutates_args=())
def _split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.choose("split_batch_norm", (x,)).split_batch_norm(x, weight, bias, splits, eps)


@_split_batch_norm.register_fake
def _(x, weight, bias, splits, eps):
    mean, var = (x.new_empty((splits, x.shape[1]), dtype=reference.compute_dtype(x)) for _ in range(2))
    return torch.empty_like(reference.dense(x)), mean, var


@torch.library.custom_op("moco_fast::split_batch_norm_backward", mutates_args=())
def _split_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backends.choose("split_batch_norm", (x, dy))
    return backend.split_batch_norm_backward(dy, x, weight, mean, var, eps)


@_split_batch_norm_backward.register_fake
def _(dy, x, weight, mean, var, eps):
    dw, db = (mean.new_empty((x.shape[1],)) for _ in range(2))
    return torch.empty_like(reference.dense(x)), dw, db


def _save(ctx, inputs, output):
    x, weight, bias, _, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)  # mean and var are detached: no zeros in place of their gradients


def _gradients(ctx, dy, *_):
    if dy is None:
        return None, None, None, None, None
    x, weight, mean, var = ctx.saved_tensors
    dx, dw, db = _split_batch_norm_backward(dy, x, weight, mean, var, ctx.eps)
    dw = None if weight is None else dw.to(weight.dtype)
    return dx, dw, None if ctx.bias_dtype is None else db.to(ctx.bias_dtype), None, None


_split_batch_norm.register_autograd(_gradients, setup_context=_save)


class SplitBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of ``splits`` devices, on one.

    In training the batch is cut into ``splits`` consecutive parts, each
    normalised with its own mean and variance, as each of ``splits`` devices
    would do. The running statistics are the mean of the parts'. Evaluation is
    plain batch normalisation. Parameters and buffers have BatchNorm's names.

    Source: the statistics that shuffling BN relies on, He et al. 2020, section 3.3.

    Raises:
        ValueError: in training, a batch that ``splits`` does not divide, or parts of one value per channel.
    """

    def __init__(
        self, num_features: int, splits: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = checks.count("bn_splits", splits)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"input must have at least 2 dimensions (N, C, ...), got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        """Normalise each part of the batch by itself."""
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"bn_splits={self.splits} must divide the batch, got {x.shape[0]} samples")
        y, mean, var = split_batch_norm(x, self.weight, self.bias, self.splits, self.eps)
        self._track(mean, var, x.numel() // mean.numel())
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Move the running statistics towards the parts' mean, whose variances are over ``values`` each."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        unbiased = var.mean(0) * (values / (values - 1))
        for running, found in ((self.running_mean, mean.mean(0)), (self.running_var, unbiased)):
            factor: float | Tensor | None = self.momentum
            if factor is None:  # the cumulative average; the count stays on its device
                factor = self.num_batches_tracked.to(running.dtype).reciprocal()
            running.lerp_(found.to(running.dtype), factor)


def split_batchnorm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every batch norm in ``module`` by a :class:`SplitBatchNorm` of the same parameters."""
    replaced: dict[nn.Module, nn.Module] = {}  # a module used under two names stays one module

    def convert(old: nn.Module) -> nn.Module:
        if old not in replaced:
            replaced[old] = _split(old, splits) if isinstance(old, _BatchNorm) else old
            for name, child in old._modules.items():
                if child is not None:
                    old._modules[name] = convert(child)
        return replaced[old]

    return convert(module)


def _split(old: _BatchNorm, splits: int) -> SplitBatchNorm:
    new = SplitBatchNorm(old.num_features, splits, old.eps, old.momentum)
    # The same tensors, not copies: an optimizer or a tie made earlier stays valid.
    new._parameters, new._buffers = old._parameters, old._buffers
    new.affine, new.track_running_stats = old.affine, old.track_running_stats
    new.training = old.training
    return new
