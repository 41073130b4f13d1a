"""Batch norm with the statistics of parts of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES, FP32


def split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm`."""
    x, shape = _parts(x, splits)
    weight, bias = _in_fp32(weight), _in_fp32(bias)
    y, mean, var = torch.empty_like(x), *(torch.empty(splits, shape[2], **FP32) for _ in range(2))
    compiled._C.split_batch_norm(
        shape, DTYPES[x.dtype], x.data_ptr(), _address(weight), _address(bias), eps,
        y.data_ptr(), mean.data_ptr(), var.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, var


def split_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm_backward`."""
    x, shape = _parts(x, len(mean))
    dy, weight = reference.like(dy, x), _in_fp32(weight)
    dx, dw, db = torch.empty_like(x), *(torch.empty(shape[2], **FP32) for _ in range(2))
    compiled._C.split_batch_norm_backward(
        shape, DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), _address(weight), mean.data_ptr(),
        var.data_ptr(), eps, dx.data_ptr(), dw.data_ptr(), db.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw, db


def _parts(x: Tensor, splits: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A dense tensor, and its parts, rows of each, channels and run as it lies in memory."""
    x = reference.dense(x)
    rows, run = reference.runs(x)
    return x, (splits, rows // splits, x.shape[1], run)


def _in_fp32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
