"""Which calls the sweep written for Hopper serves, csrc/info_nce_sweep.h, and how it divides them.

``native.info_nce_sweep`` launches it. It does what ``info_nce._prepare`` and ``_sweep`` do in one
launch, and writes what ``_finish`` reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOPPER = (9, 0)
# As in csrc/info_nce_sweep.h: rows of the queue at a time; the most queries for which blocks hold 64 of them
# instead of 128; features.
TILE, FEW, MOST_FEATURES = 128, 64, 128
FEWEST_FEATURES = 72  # of 64 it would multiply as many zeros
READS = {"high": torch.float16, "medium": torch.bfloat16}  # dtype of the queue by precision

# Numbers of queries, "few" or "many", at which it is taken unasked: where bench_info_nce measured it to be at
# least 15 % faster than Triton's sweep. It was not measured yet.
UNASKED: tuple[str, ...] = ()


def lacks(tensor: Tensor) -> str | None:
    """Why it cannot take a CUDA tensor of rows, or None if it can."""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if (major, minor) != HOPPER:
        return f"its kernel is for compute capability 9.0, {tensor.device} has {major}.{minor}"
    features = tensor.shape[-1]
    if features % 8 or not FEWEST_FEATURES <= features <= MOST_FEATURES:
        wanted = f"a multiple of 8 from {FEWEST_FEATURES} to {MOST_FEATURES}"
        return f"its kernel takes {wanted} features, got {features}"
    return None


def check_queue(queue: Tensor, precision: str) -> None:
    """Raises RuntimeError for a queue that would have to be converted first."""
    if READS.get(precision) != queue.dtype:
        wanted = ", ".join(f"{dtype} for precision {name!r}" for name, dtype in READS.items())
        raise RuntimeError(
            "backend 'native' was asked for, but cannot serve info_nce: on a GPU it reads a queue of "
            f"{wanted}, got {queue.dtype} for {precision!r}"
        )


def blocks_of(n: int) -> tuple[int, int, int]:
    """Queries per block, rows of the queue per tile, and blocks that work on a share of the queue."""
    return (FEW, TILE, 1) if n <= FEW else (2 * FEW, TILE, 2)
