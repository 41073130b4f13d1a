"""What every kernel file needs: how Triton runs here, and the sizes its grids follow from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET=1 runs kernels on the CPU, in NumPy. It has to be set before a kernel file is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret

# The interpreter multiplies matrices of bf16 wrongly (Triton 3.5 to 3.9) and those of fp16 slowly: there they
# are widened first; products of 16-bit values are exact in fp32.
WIDEN = tl.constexpr(INTERPRETED)

EPS = tl.constexpr(1e-12)  # smallest norm a row is divided by, as in torch.nn.functional.normalize
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's device, whatever the current one is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter, whose programs run one by one."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_tma(device: torch.device) -> bool:
    """Whether blocks are loaded through descriptors: by Hopper's copy engine, or the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def row_norms(
    x,  # (R, C) fp32, zero where masked
):
    """Euclidean norm of every row, (R, 1), without overflow of the squares."""
    top = tl.max(tl.abs(x), axis=1, keep_dims=True)
    scale = tl.where((top > 0) & (top < float("inf")), top, 1.0)
    x = x / scale
    return scale * tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True))


@triton.jit
def widened(x):
    """An operand of ``tl.dot`` as the hardware, or the interpreter, multiplies it correctly."""
    if WIDEN:
        x = x.to(tl.float32)
    return x
