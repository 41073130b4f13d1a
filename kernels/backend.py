"""The Triton backend: which op it serves on which tensors, and where its kernels are launched.

Kernel files are imported when first called, because importing them imports
Triton, which need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

HOLDS_ROWS = ("info_nce", "nt_xent", "contrast", "dino")  # ops whose kernels hold whole rows in registers
OPS = (*HOLDS_ROWS, "ema_update_", "enqueue_", "take_rows", "split_batch_norm", "augment")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FEATURES = 512
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
        if tensor.is_cuda and torch.version.hip:
            return "its kernels are for NVIDIA GPUs, this PyTorch is for AMD's"
        if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < OLDEST:
            return "it needs a GPU of compute capability 8.0 or newer"
        if op != "take_rows" and not (
            tensor.dtype in DTYPES or (op == "ema_update_" and tensor.dtype == torch.float64)
        ):
            return f"it has no {tensor.dtype} kernel"
        if op in HOLDS_ROWS and tensor.ndim > 1 and tensor.shape[-1] > MAX_FEATURES:
            return f"it holds rows of up to {MAX_FEATURES} features in registers, got {tensor.shape[-1]}"
    return None


def _launcher(name: str, file: str) -> Callable[..., Any]:
    """The function of a kernel file, called on the device of its first tensor."""

    def launch(*args: Any, **options: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with on_device_of(first):
            return getattr(importlib.import_module(f"moco_fast.kernels.{file}"), name)(*args, **options)

    return launch


# With the arguments and results of their namesakes in moco_fast.reference.
info_nce = _launcher("info_nce", "info_nce")
nt_xent = _launcher("nt_xent", "nt_xent")
contrast = _launcher("contrast", "contrast")
dino = _launcher("dino", "dino")
ema_update_ = _launcher("ema_update_", "ema_update")
enqueue_ = _launcher("enqueue_", "enqueue")
take_rows = _launcher("take_rows", "take_rows")
split_batch_norm = _launcher("split_batch_norm", "split_batch_norm")
split_batch_norm_backward = _launcher("split_batch_norm_backward", "split_batch_norm")
augment = _launcher("augment", "augment")
