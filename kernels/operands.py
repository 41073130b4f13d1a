"""Rows as the matrix products of ``pairs`` and ``dino`` read them: in 16 bit, twice for "highest"."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast.kernels.common import operand_dtype, padded_features, row_norms, store_operand, unit_rows


class Operand(NamedTuple):
    """D matrices of rows, one after the other."""

    high: Tensor  # (D * padded, width) fp16 or bf16, zero outside the rows of each
    low: Tensor  # what rounding took from ``high``, for precision "highest"; else ``high``


def aligned(rows: Tensor) -> Tensor:
    """Contiguous rows as TMA takes them: 16-byte aligned, a multiple of 16 bytes each; else a copy."""
    rows = rows.view(-1).view(rows.shape)  # a single row may have any stride, and TMA looks at it
    missing = -rows.shape[1] % 8
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    return rows.clone() if rows.data_ptr() % 16 else rows


def operand(
    x: Tensor,  # (D, R, C) raw
    precision: str,
    *,
    unit: bool,  # normalise
    padding: int = 1,  # rows of each are padded to a multiple
) -> Operand:
    """Round rows to what the matrix products read, unless that is what they are."""
    x = x.contiguous()
    problems, rows, features = x.shape
    padded, width = -(-rows // padding) * padding, -(-features // 8) * 8  # TMA: rows of 16 bytes
    dtype, split = operand_dtype(precision), precision == "highest"
    aligned = (padded, width) == (rows, features) and x.data_ptr() % 16 == 0  # TMA: from a multiple of 16
    if aligned and x.dtype == dtype and not unit and not split:
        flat = x.view(-1, width)
        return Operand(flat, flat)
    high = torch.empty((problems * padded, width), dtype=dtype, device=x.device)
    low = torch.empty_like(high) if split else high
    block_c = padded_features(features)
    block_r = max(1, 4096 // block_c)
    _prepare[(triton.cdiv(padded, block_r), problems)](
        x, high, low, rows, features, padded,
        WIDTH=width, BLOCK_R=block_r, BLOCK_C=block_c, SPLIT=split, UNIT=unit, enable_fp_fusion=True,
    )  # fmt: skip
    return Operand(high, low)


@triton.jit
def _prepare(
    x,  # (D, R, C) raw
    high, low,  # (D, PADDED, WIDTH) operands; low only if SPLIT
    R, C, PADDED,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    problem = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :]
    at = (problem * R + row) * C + col
    value = tl.load(x + at, mask=(row < R) & (col < C), other=0).to(tl.float32)
    if UNIT:
        value = unit_rows(value, row_norms(value))
    to = (problem * PADDED + row) * WIDTH + col
    store_operand(high, low, to, value, (row < PADDED) & (col < WIDTH), SPLIT)
