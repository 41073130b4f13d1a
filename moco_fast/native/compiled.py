"""The compiled module ``_C``, if it was built, and what it serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast.kernels import info_nce_sweep as sweep

_C: Any
try:
    # torch is imported above, so that both share one OpenMP runtime.
    from moco_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = None
    _import_error = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Ops over lists of tensors, the optimizers' steps among them: kernels for CPU and GPU, also in float64.
MULTI_TENSOR = ("ema_update_", "sgd_", "adamw_")
ROWS = ("take_rows",)  # of any dtype: bytes are moved, not numbers
OPS = (
    "info_nce",
    "contrast",
    "nt_xent",
    "dino",
    "enqueue_",
    *ROWS,
    *MULTI_TENSOR,
    "split_batch_norm",
    "augment",
)
# Ops whose CUDA kernel this backend launches only where it is forced; kernels/info_nce_sweep.py says when
# Triton's launcher takes it.
ON_REQUEST = ("info_nce",)

FP32: Any = {"dtype": torch.float32, "device": "cpu"}


def build_info() -> dict:
    """What the installation built and why, as recorded by setup.py; empty if it recorded nothing."""
    path = Path(__file__).parents[1] / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def unavailable() -> str | None:
    """Why the compiled module is missing, or None if it is there."""
    if _C is not None:
        return None
    return build_info().get("why") or f"moco_fast._C cannot be imported ({_import_error})"


def has_bf16_units() -> bool:
    """Whether this CPU has matrix units for bf16 (AMX) and the kernels use them.

    AVX512-BF16 alone multiplies vectors: on Zen 4 products in it took 1.1 to 2.1 times as long as fp32.
    """
    return _C is not None and _C.has_amx()


def cannot_serve(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why this backend cannot run ``op`` on the tensors, or None if it can."""
    if _C is None:
        return unavailable()
    if op not in OPS:
        return f"it has no {op} kernel"
    for tensor in tensors:
        kind = tensor.device.type
        if kind == "cuda" and op in (*MULTI_TENSOR, "info_nce"):
            if reason := _gpu_lacks(tensor.device) or (op == "info_nce" and sweep.lacks(tensor)):
                return reason
        elif kind != "cpu":
            return f"it runs on the CPU, the tensors are on {tensor.device}"
        if op in ROWS:
            continue
        if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64 and op not in MULTI_TENSOR):
            return f"it has no {tensor.dtype} kernel"
    return None


@cache
def _gpu_lacks(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a GPU, or None if they can."""
    if not _C.has_cuda or torch.version.cuda is None:
        return f"it was built without CUDA, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its CUDA kernels want compute capability 8.0, {device} has {major}.{minor}"
    if not _C.cuda_devices():
        return "its CUDA runtime finds no GPU: the driver is older than the toolkit it was built with"
    return None


def stream(device: torch.device) -> int:
    """The address of torch's current stream on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
