"""Ops that move rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES


def enqueue_(
    queue: Tensor, ptr: Tensor, keys: Tensor, mirror: Tensor | None = None, order: Tensor | None = None
) -> None:
    """See :func:`moco_fast.reference.enqueue_`."""
    if mirror is not None or not queue.is_contiguous():  # on a CPU nothing reads a mirror
        return reference.enqueue_(queue, ptr, keys, mirror, order)
    keys = keys.contiguous()
    order = None if order is None else order.contiguous()
    compiled._C.enqueue(
        queue.data_ptr(), DTYPES[queue.dtype], *queue.shape, ptr.data_ptr(),
        keys.data_ptr(), DTYPES[keys.dtype], keys.shape[0], 0 if order is None else order.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`moco_fast.reference.take_rows`."""
    out, index = reference.empty_rows(x, index.shape[0]), index.contiguous()
    compiled._C.take_rows(
        x.data_ptr(), x[0].numel() * x.element_size(), index.data_ptr(), index.shape[0], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
