"""What the references share: the dtype of the arithmetic, normalised rows, memory formats."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by, as in torch.nn.functional.normalize


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or float64 if a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def normalise(
    x: Tensor,  # (..., C)
) -> tuple[Tensor, Tensor]:
    """Return ``x / max(|x|, EPS)`` row by row, and the norms (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(EPS), norm


def dense(x: Tensor) -> Tensor:  # (N, C, ...)
    """The tensor itself if contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def is_channels_last(x: Tensor) -> bool:  # (N, C, ...)
    """Whether every sample is one stretch of memory with the channels last."""
    return x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def flat_rows(
    x: Tensor,  # (R, ...) contiguous or channels_last
) -> Tensor:
    """The rows as they lie in memory, (R, values): a view."""
    return (x.movedim(1, -1) if is_channels_last(x) else x).view(x.shape[0], x.shape[1:].numel())


def empty_rows(x: Tensor, count: int) -> Tensor:
    """Memory for ``count`` rows such as those of ``x``, in its memory format."""
    if is_channels_last(x):
        return x.new_empty((count, *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty((count, *x.shape[1:]))


def runs(x: Tensor) -> tuple[int, int]:
    """Rows and run of a dense tensor (N, C, ...) as it lies in memory: (rows, C, run).

    With L values of a channel in a sample, that is (N, L) if contiguous, (N L, 1) if channels-last.
    """
    length = x.numel() // (x.shape[0] * x.shape[1])
    return (x.shape[0], length) if x.is_contiguous() else (x.shape[0] * length, 1)


def like(dy: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype of a dense tensor, and as that lies in memory."""
    same = dy.dtype == x.dtype and dy.is_contiguous() == x.is_contiguous()
    return dy if same and dense(dy) is dy else torch.empty_like(x).copy_(dy)
