"""Enqueue keys: queue[(ptr + i) % K] <- k_i / max(|k_i|, 1e-12), then ptr <- (ptr + N) % K.

With an ``order``, k_i is row order[i] of the keys: what un-shuffles them on the way.

One launch reads the keys and writes normalised rows to the queue and, where
there is one, to its 16-bit mirror; the pointer stays on the device. A second
launch moves the pointer, after every program of the first has read it.
Traffic: N C (bytes of a key + of a row + 2 for the mirror).

Reference: moco_fast.reference.enqueue_.  Tests: tests/test_enqueue.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels.common import row_norms, unit_rows

# (elements of keys per program, warps), whatever the width. Not measured on a GPU yet.
TILES = {"rows": (2048, 4)}


@triton.jit
def _inside(ptr, K):
    """A pointer modulo K, never negative: no bad value on the device may become a write outside the queue."""
    ptr = ptr % K
    return tl.where(ptr < 0, ptr + K, ptr)


@triton.jit
def _write(
    queue, mirror,  # (K, C); mirror if HAS_MIRROR
    ptr,  # (1,) int64
    keys,  # (N, C) raw
    order,  # (N,) int64, if HAS_ORDER
    N, K, C,
    HAS_MIRROR: tl.constexpr, HAS_ORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (col < C)
    source = tl.load(order + row, mask=row < N, other=0) if HAS_ORDER else row.to(tl.int64)
    key = tl.load(keys + source * C + col, mask=inside, other=0).to(tl.float32)
    unit = unit_rows(key, row_norms(key))
    slot = (_inside(tl.load(ptr), K) + row) % K
    tl.store(queue + slot * C + col, unit.to(queue.dtype.element_ty), mask=inside)
    if HAS_MIRROR:
        tl.store(mirror + slot * C + col, unit.to(mirror.dtype.element_ty), mask=inside)


@triton.jit
def _advance(ptr, N, K):
    tl.store(ptr, (_inside(tl.load(ptr), K) + N) % K)


def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,)
    keys: Tensor,  # (N, C)
    mirror: Tensor | None = None,  # (K, C)
    order: Tensor | None = None,  # (N,)
    tiles: tuple[int, int] | None = None,
) -> None:
    """See :func:`moco_fast.reference.enqueue_`; ``tiles`` in place of the table's entry."""
    if not queue.is_contiguous() or not (mirror is None or mirror.is_contiguous()):
        return reference.enqueue_(queue, ptr, keys, mirror, order)
    keys = keys.contiguous()
    count, features = keys.shape
    block_c = triton.next_power_of_2(features)
    elements, warps = tiles or TILES["rows"]
    block_r = max(1, elements // block_c)
    _write[(triton.cdiv(count, block_r),)](
        queue, queue if mirror is None else mirror, ptr, keys,
        ptr if order is None else order.contiguous(), count, queue.shape[0], features,
        HAS_MIRROR=mirror is not None, HAS_ORDER=order is not None, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    _advance[(1,)](ptr, count, queue.shape[0])


CANDIDATES = {
    "rows": [(elements, warps) for elements in (128, 256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8)]
}


def tune_case(key: str, slots: int = 65536, device: str = "cuda") -> Callable[[tuple], Callable[[], None]]:
    """What bench/tune.py times: 256 keys of 128 features into a queue with a 16-bit mirror."""
    queue, keys = torch.zeros(slots, 128, device=device), torch.randn(256, 128, device=device)
    ptr, mirror = torch.zeros(1, dtype=torch.int64, device=device), queue.half()
    return lambda tiles: lambda: enqueue_(queue, ptr, keys, mirror, tiles=tiles)
