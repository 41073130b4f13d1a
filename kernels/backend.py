"""The Triton backend: which op it serves on which tensors, and where its kernels are launched.

Kernel files are imported when first called, because importing them imports
Triton, which need not be installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from moco_fast import reference

OPS = ("info_nce", "nt_xent", "contrast", "dino", "ema_update_", "enqueue_", "take_rows", "split_batch_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FEATURES = 512
HOLDS_ROWS = ("info_nce", "nt_xent", "contrast", "dino")  # ops whose kernels hold whole rows in registers
OLDEST = (8, 0)  # compute capability: bf16 and asynchronous copies


def interpreted() -> bool:
    """Whether kernels run on the CPU, through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def installed() -> bool:
    """Whether Triton can be imported; looked for once, since every call of an op asks."""
    return importlib.util.find_spec("triton") is not None


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's device, whatever the current one is, and touch no GPU that is left."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cannot_serve(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot run ``op`` on the tensors, or None if it can."""
    if not installed():
        return "Triton is not installed"
    if op not in OPS:
        return f"it has no kernel for {op}"
    for tensor in tensors:
        if tensor.device.type == "cpu" and not interpreted():
            return "it runs on the GPU (on the CPU with TRITON_INTERPRET=1, for tests)"
        if tensor.device.type not in ("cuda", "cpu"):
            return f"it runs on the GPU, the tensors are on {tensor.device}"
        if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < OLDEST:
            return "it needs a GPU of compute capability 8.0 or newer"
        if op != "take_rows" and not (
            tensor.dtype in DTYPES or (op == "ema_update_" and tensor.dtype == torch.float64)
        ):
            return f"it has no {tensor.dtype} kernel"
        if op in HOLDS_ROWS and tensor.ndim > 1 and tensor.shape[-1] > MAX_FEATURES:
            return f"it holds rows of up to {MAX_FEATURES} features in registers, got {tensor.shape[-1]}"
    return None


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    precision: str,
    need_dq: bool,
    need_stats: bool,
    *,
    by_hand: bool | None = None,  # see kernels/info_nce.py
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.info_nce`."""
    from moco_fast.kernels.info_nce import info_nce

    with on_device_of(q):
        return info_nce(q, k, queue, temperature, precision, need_dq, need_stats, by_hand=by_hand)


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor, masters: Sequence[Tensor] = ()
) -> None:
    """See :func:`moco_fast.reference.ema_update_`."""
    from moco_fast.kernels.ema_update import ema_update_

    with on_device_of(targets[0]):
        ema_update_(targets, sources, m, masters)


def enqueue_(
    queue: Tensor, ptr: Tensor, keys: Tensor, mirror: Tensor | None = None, order: Tensor | None = None
) -> None:
    """See :func:`moco_fast.reference.enqueue_`."""
    from moco_fast.kernels.enqueue import enqueue_

    if not queue.is_contiguous() or not (mirror is None or mirror.is_contiguous()):
        return reference.enqueue_(queue, ptr, keys, mirror, order)
    with on_device_of(queue):
        enqueue_(queue, ptr, keys, mirror, order)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`moco_fast.reference.take_rows`."""
    from moco_fast.kernels.take_rows import take_rows

    with on_device_of(x):
        return take_rows(x, index)


def nt_xent(z: Tensor, temperature: float, precision: str, need_dz: bool) -> tuple[Tensor, Tensor]:
    """See :func:`moco_fast.reference.nt_xent`."""
    from moco_fast.kernels.nt_xent import nt_xent

    with on_device_of(z):
        return nt_xent(z, temperature, precision, need_dz)


def contrast(
    q: Tensor, k: Tensor, temperature: float, first: int, precision: str, need_dq: bool, need_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.contrast`."""
    from moco_fast.kernels.contrast import contrast

    with on_device_of(q):
        return contrast(q, k, temperature, first, precision, need_dq, need_dk)


def dino(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    precision: str,
    need_ds: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.dino`."""
    from moco_fast.kernels.dino import dino

    with on_device_of(student):
        return dino(
            student, teacher, prototypes, teacher_prototypes, center,
            student_temperature, teacher_temperature, precision, need_ds, need_dw,
        )  # fmt: skip


def split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm`."""
    from moco_fast.kernels.split_batch_norm import split_batch_norm

    with on_device_of(x):
        return split_batch_norm(x, weight, bias, splits, eps)


def split_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.split_batch_norm_backward`."""
    from moco_fast.kernels.split_batch_norm import split_batch_norm_backward

    with on_device_of(x):
        return split_batch_norm_backward(dy, x, weight, mean, var, eps)
