"""Batch normalisation over parts of a batch: one device standing for several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_fast import checks, distributed
from moco_fast.ops import split_batch_norm


class SplitBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of ``splits`` devices, on one.

    In training the batch is cut into ``splits`` consecutive parts, each
    normalised with its own mean and variance, as each of ``splits`` devices
    would do. The running statistics are the mean of the parts'. Evaluation is
    plain batch normalisation. Parameters and buffers have BatchNorm's names.

    Source: the statistics that shuffling BN relies on, He et al. 2020, section 3.3.

    Args:
        num_features: C of an input (N, C, ...).
        splits: number of parts; it must divide N.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None: they are cumulative averages.

    Raises:
        TypeError: ``splits`` is not an integer.
        ValueError: ``splits`` below 1; in training, a batch that ``splits`` does not divide, or parts of one
            value per channel.
    """

    def __init__(
        self, num_features: int, splits: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = checks.count("splits", splits)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"input must have at least 2 dimensions (N, C, ...), got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        """Normalise each part of the batch by itself."""
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"splits={self.splits} must divide the batch, got {x.shape[0]} samples")
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
        self.num_batches_tracked.add_(1)  # not +=, which would register the buffer anew
        unbiased = var.mean(0) * (values / (values - 1))
        for running, found in ((self.running_mean, mean.mean(0)), (self.running_var, unbiased)):
            factor: float | Tensor | None = self.momentum
            if factor is None:  # the cumulative average; the count stays on its device
                factor = self.num_batches_tracked.to(running.dtype).reciprocal()
            running.lerp_(found.to(running.dtype), factor)


def average_statistics_(module: nn.Module) -> None:
    """Make the running statistics of every batch norm the mean over ranks: what SplitBatchNorm keeps."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    statistics = [value for m in norms for value in (m.running_mean, m.running_var) if value is not None]
    distributed.average_(*statistics)


def sees_neighbours(module: nn.Module) -> bool:
    """Whether features of a sample depend, through batch norm, on which samples share its process.

    Not if there is no batch norm, and not if all of it is synchronised over all processes.
    """
    return any(
        getattr(m, "running_mean", None) is not None
        or ("batchnorm" in type(m).__name__.lower() and not any(m.children()))
        for m in module.modules()
        if not (isinstance(m, nn.SyncBatchNorm) and _ranks_of(m) == distributed.world_size())
    )


def _ranks_of(norm: nn.SyncBatchNorm) -> int:
    group = norm.process_group
    return distributed.world_size() if group is None else dist.get_world_size(group)


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
