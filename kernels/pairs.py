"""Rows against the columns of one batch: the two passes that ``nt_xent`` and ``contrast`` are made of.

X (R, C) and Y (M, C) are normalised rows, s_ij = x_i.y_j / T. Every row has one
positive column; the others are its negatives, except its own where the columns
are the rows themselves (PAIRED, see below). With L_i the log-sum-exp of row i::

    first pass    l_i = sum_j exp(s_ij)                        over the negatives j of i
                  g_i = sum_j exp(s_ij) y_j                    if GRADIENT
    second pass   g_i = sum_j exp(s_ij - L_j) y_j              L of the columns, given
                  g_i = sum_j (exp(s_ij - L_i) + exp(s_ij - L_j)) y_j       if PAIRED

The second pass is the gradient to rows that were the columns of a first pass:
no atomics, and across ranks only L, not gradients, would have to travel. The
positive is left out of every sum; ``_losses`` and ``_gradients`` add its part,
computed in fp32 from the raw rows: ``1 - p`` of the positive is l / (l + e),
never a subtraction.

The positive of row i is column ``first + i``. PAIRED rows are two views of R / 2
images one after the other, and are columns ``first`` to ``first + R`` of Y: the
positive is the other view. ``first`` is 0 unless Y was gathered from several ranks.

Several independent problems of one shape (D, the third axis of the grid) share
a launch. A program holds BLOCK_M rows and walks its share of the columns; a
small kernel adds the shares in a fixed order, so results are bitwise repeatable.
The R x M similarities never reach memory. A pass makes 2 R M C FLOP, 4 with a
gradient, and R M exponentials.

Rows are of unit norm, so -1/T <= s <= 1/T and a constant shift replaces the
running maximum where exponentials of that range fit (``FIXED_SHIFT_FROM``).

Tests: tests/test_nt_xent.py, tests/test_contrast.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moco_fast.kernels.common import (
    FIXED_SHIFT_FROM,
    LOG2E,
    add_shares,
    cross_entropy,
    exp2_scaled,
    finishing_blocks,
    multiprocessors,
    operand_dtype,
    padded_features,
    product,
    row_norms,
    shares_of,
    store_operand,
    through_norm,
    unit_rows,
)

# (BLOCK_M, BLOCK_N, warps, stages, programs per multiprocessor) by (pass, padded C); "split" is precision
# "highest". Not measured on a GPU yet: chosen so that on sm_90 nothing spills and no wgmma waits for another,
# which none of the tiles tried achieves for the gradient of split operands of 512 features.
TILES = {
    ("sums", 32): (128, 128, 8, 4, 2),
    ("sums", 64): (128, 128, 8, 4, 2),
    ("sums", 128): (128, 128, 8, 3, 1),
    ("sums", 256): (128, 64, 8, 3, 1),
    ("sums", 512): (64, 64, 4, 2, 1),
    ("gradient", 32): (128, 64, 8, 4, 2),
    ("gradient", 64): (128, 64, 8, 3, 2),
    ("gradient", 128): (128, 64, 8, 3, 1),
    ("gradient", 256): (64, 64, 8, 2, 1),
    ("gradient", 512): (64, 16, 8, 2, 1),
    ("split sums", 32): (128, 128, 8, 4, 2),
    ("split sums", 64): (128, 128, 8, 3, 1),
    ("split sums", 128): (128, 64, 8, 3, 1),
    ("split sums", 256): (64, 64, 4, 2, 1),
    ("split sums", 512): (64, 16, 4, 2, 1),
    ("split gradient", 32): (128, 64, 8, 3, 2),
    ("split gradient", 64): (128, 64, 8, 3, 1),
    ("split gradient", 128): (128, 64, 8, 2, 1),
    ("split gradient", 256): (64, 16, 4, 2, 1),
    ("split gradient", 512): (64, 16, 4, 1, 1),
}
PADDING = 128  # a multiple of every block of rows or columns

# Exponentials are operands too, scaled by a power of two so that fp16 does not lose the small ones: before
# that they are up to 1 in the first pass, up to 2 in the second.
OFFSET = {torch.float16: (15.0, 14.0), torch.bfloat16: (0.0, 0.0)}


class Operand(NamedTuple):
    """Normalised rows as the matrix products read them, D problems one after the other."""

    high: Tensor  # (D * padded, width) fp16 or bf16, zero outside the problems
    low: Tensor  # what rounding took from ``high``, for precision "highest"; else ``high``
    padded: int  # rows a problem takes up


class Partial(NamedTuple):
    """What the programs of a pass left behind, one part per share of the columns."""

    sums: Tensor  # (SHARES, D, R, C) fp32
    totals: Tensor  # (SHARES, D, R) fp32, first pass
    shifts: Tensor  # (SHARES, D, R) fp32, first pass
    factor: float  # 2^-OFFSET of the second pass


class Losses(NamedTuple):
    """Per row, after the first pass."""

    loss: Tensor  # (D, R) fp32
    log2_sum: Tensor  # (D, R) fp32: the log-sum-exp, positive included, in base 2
    miss: Tensor  # (D, R) fp32: 1 - p of the positive
    dx: Tensor  # (D, R, C) fp32, or empty


@triton.jit
def _normalise(
    x,  # (D, R, C) raw
    high, low,  # (D, PADDED, WIDTH) operands; low only if SPLIT
    R, C, PADDED,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    problem = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :]
    at = (problem * R + row) * C + col
    value = tl.load(x + at, mask=(row < R) & (col < C), other=0).to(tl.float32)
    to = (problem * PADDED + row) * WIDTH + col
    inside = (row < PADDED) & (col < WIDTH)
    store_operand(high, low, to, unit_rows(value, row_norms(value)), inside, SPLIT)


@triton.jit
def _partner(
    row, first, R,
    PAIRED: tl.constexpr,
):  # fmt: skip
    """Column of the positive."""
    if PAIRED:
        row = tl.where(row < R // 2, row + R // 2, row - R // 2)
    return row + first


@triton.jit
def _meets(start, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether columns [start, start + BLOCK_N) and [first, first + BLOCK_M) have one in common."""
    return (start < first + BLOCK_M) & (first < start + BLOCK_N)


@triton.jit
def _sweep(
    x_desc, x_low_desc,  # (D * X_PADDED, WIDTH) operands
    y_desc, y_low_desc,  # (D * Y_PADDED, WIDTH)
    x_log2_sum, y_log2_sum,  # (D, R), (D, M) fp32, if SECOND; x only if PAIRED too
    sums,  # (SHARES, D, R, C) fp32, if GRADIENT
    totals, shifts,  # (SHARES, D, R) fp32, unless SECOND
    R, M, C, X_PADDED, Y_PADDED, first, tiles_per_share, scale, fixed_shift,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    SECOND: tl.constexpr, PAIRED: tl.constexpr, BOUNDED: tl.constexpr, SPLIT: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    block, share, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_tile = share * tiles_per_share
    last_tile = tl.minimum(first_tile + tiles_per_share, tl.cdiv(M, BLOCK_N))
    start = block * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    positive = _partner(row, first, R, PAIRED)
    x = x_desc.load([problem * X_PADDED + start, 0])
    x_low = x_low_desc.load([problem * X_PADDED + start, 0]) if SPLIT else x

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # The running maximum starts below any similarity, but finite: a whole tile may be left out of the sums.
    shift = tl.zeros((BLOCK_M,), tl.float32) + (fixed_shift if BOUNDED else -2 * scale - 64)
    own_weight = tl.zeros((BLOCK_M,), tl.float32)
    if SECOND and PAIRED:
        own = x_log2_sum + problem.to(tl.int64) * R + row
        own_weight = OFFSET - tl.load(own, mask=row < R, other=float("inf"))
        if BOUNDED:
            own_weight = tl.exp2(own_weight)

    for tile in range(first_tile, last_tile):
        column = tile * BLOCK_N
        y = y_desc.load([problem * Y_PADDED + column, 0])
        y_low = y_low_desc.load([problem * Y_PADDED + column, 0]) if SPLIT else y
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = product(x, x_low, tl.trans(y), tl.trans(y_low), s, SPLIT, SPLIT)
        col = column + tl.arange(0, BLOCK_N)
        left_out = (col[None, :] == positive[:, None]) | (col >= M)[None, :]
        if PAIRED:
            left_out |= col[None, :] == (first + row)[:, None]
        s = tl.where(left_out, float("-inf"), s)

        if SECOND:
            theirs = y_log2_sum + problem.to(tl.int64) * M + col
            weight = OFFSET - tl.load(theirs, mask=col < M, other=float("inf"))
            if PAIRED and BOUNDED:
                p = tl.exp2(s * scale) * (own_weight[:, None] + tl.exp2(weight)[None, :])
            else:
                p = exp2_scaled(s, scale, -weight[None, :])
                if PAIRED:
                    p += exp2_scaled(s, scale, -own_weight[:, None])
        else:
            if not BOUNDED:
                # Against the scaled maximum, less the offset: the largest exponential is 2^OFFSET.
                grown = tl.maximum(shift, tl.max(s, axis=1) * scale - OFFSET)
                rescale = tl.exp2(shift - grown)
                total *= rescale
                if GRADIENT:
                    acc *= rescale[:, None]
                shift = grown
            p = exp2_scaled(s, scale, shift[:, None])
            total += tl.sum(p, axis=1)
        if GRADIENT:
            p_high = p.to(x.dtype)
            p_low = (p - p_high.to(tl.float32)).to(x.dtype) if SPLIT else p_high
            acc = product(p_high, p_low, y, y_low, acc, SPLIT, SPLIT)

    at = (share * tl.num_programs(2) + problem).to(tl.int64) * R + row
    if not SECOND:
        tl.store(totals + at, total, mask=row < R)
        tl.store(shifts + at, shift, mask=row < R)
    if GRADIENT:
        # 32-bit offsets from one 64-bit address: as many addresses as sums would not fit in registers.
        first_row = sums + ((share * tl.num_programs(2) + problem).to(tl.int64) * R + start) * C
        here, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_C)[None, :]
        tl.store(first_row + (here * C + c), acc, mask=(here < R - start) & (c < C))


@triton.jit
def _losses(
    x, y,  # (D, R, C), (D, Y, C) raw
    sums, totals, shifts,  # see _sweep
    loss, log2_sum, miss,  # (D, R) fp32
    dx,  # (D, R, C) fp32, if GRADIENT
    R, Y, C, first, scale, inverse_t,
    SHARES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, PAIRED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row, problem = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1).to(tl.int64)
    valid = row < R
    n = tl.num_programs(1).to(tl.int64) * R
    at = problem * R + row
    partner = problem * Y + _partner(row, first, R, PAIRED)
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = valid[:, None] & (col < C)
    to = at[:, None] * C + col
    x_row = tl.load(x + to, mask=inside, other=0).to(tl.float32)
    y_row = tl.load(y + partner[:, None] * C + col, mask=inside, other=0).to(tl.float32)
    size = row_norms(x_row)
    x_hat, y_hat = unit_rows(x_row, size), unit_rows(y_row, row_norms(y_row))
    s0 = tl.sum(x_hat * y_hat, axis=1) * scale

    share = tl.arange(0, BLOCK_S)[None, :]
    part = share.to(tl.int64) * n + at[:, None]
    own = (share < SHARES) & valid[:, None]
    total = tl.load(totals + part, mask=own, other=0)
    shift = tl.load(shifts + part, mask=own, other=float("-inf"))
    top = tl.maximum(tl.max(shift, axis=1), s0)
    negatives = tl.sum(total * tl.exp2(shift - top[:, None]), axis=1)
    value, both = cross_entropy(negatives, s0, top)
    tl.store(loss + at, value, mask=valid)
    tl.store(log2_sum + at, top + tl.log2(both), mask=valid)
    tl.store(miss + at, negatives / both, mask=valid)
    if GRADIENT:
        mean = add_shares(sums, shifts, top, at, inside, n, C, SHARES, CHUNK, SHIFTED=True)
        d_hat = (mean / both[:, None] - (negatives / both)[:, None] * y_hat) * inverse_t
        tl.store(dx + to, through_norm(d_hat, x_hat, size), mask=inside)


@triton.jit
def _gradients(
    x, y,  # (D, R, C), (D, Y, C) raw
    sums,  # see _sweep
    miss,  # (D, Y) fp32, of the rows whose log-sum-exps the sweep was given
    dx,  # (D, R, C) fp32
    R, Y, C, first, inverse_t, factor,
    SHARES: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    row, problem = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1).to(tl.int64)
    valid = row < R
    n = tl.num_programs(1).to(tl.int64) * R
    at = problem * R + row
    partner = _partner(row, first, R, PAIRED)
    has_partner = valid & (partner >= 0) & (partner < Y)
    partner = problem * Y + partner
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = valid[:, None] & (col < C)
    to = at[:, None] * C + col
    x_row = tl.load(x + to, mask=inside, other=0).to(tl.float32)
    y_row = tl.load(y + partner[:, None] * C + col, mask=inside & has_partner[:, None], other=0)
    y_row = y_row.to(tl.float32)
    size = row_norms(x_row)
    x_hat, y_hat = unit_rows(x_row, size), unit_rows(y_row, row_norms(y_row))
    missed = tl.load(miss + partner, mask=has_partner, other=0)
    if PAIRED:
        missed += tl.load(miss + at, mask=valid, other=0)
    total = add_shares(sums, sums, missed, at, inside, n, C, SHARES, CHUNK, SHIFTED=False)
    d_hat = (total * factor - missed[:, None] * y_hat) * inverse_t
    tl.store(dx + to, through_norm(d_hat, x_hat, size), mask=inside)


def operand(
    x: Tensor,  # (D, R, C) raw, contiguous
    precision: str,
) -> Operand:
    """Normalise rows into what the matrix products read."""
    problems, rows, features = x.shape
    padded, width = -(-rows // PADDING) * PADDING, -(-features // 8) * 8  # TMA: rows of 16 bytes
    dtype = operand_dtype(precision)
    high = torch.empty((problems * padded, width), dtype=dtype, device=x.device)
    low = torch.empty_like(high) if precision == "highest" else high
    block_c = padded_features(features)
    block_r = max(1, 4096 // block_c)
    _normalise[(triton.cdiv(padded, block_r), problems)](
        x, high, low, rows, features, padded,
        WIDTH=width, BLOCK_R=block_r, BLOCK_C=block_c, SPLIT=precision == "highest",
        enable_fp_fusion=True,
    )  # fmt: skip
    return Operand(high, low, padded)


def sweep(
    x: Operand,
    y: Operand,
    problems: int,  # D
    rows: int,  # R
    columns: int,  # M
    features: int,  # C
    temperature: float,
    *,
    first: int,  # column of the positive of row 0; if ``paired``, column of row 0 itself
    paired: bool,
    gradient: bool,
    x_log2_sum: Tensor | None = None,  # (D, R), second pass of paired rows
    y_log2_sum: Tensor | None = None,  # (D, M), makes it the second pass
) -> Partial:
    """One pass over all columns."""
    second, split = y_log2_sum is not None, x.low is not x.high
    dtype, device = x.high.dtype, x.high.device
    scale = LOG2E / temperature
    # Exponentials of the first pass with a gradient are operands before they are normalised.
    in_operands = gradient and not second
    bounded = temperature >= FIXED_SHIFT_FROM[dtype if in_operands else torch.float32]
    offset = OFFSET[dtype][1 if second else 0] if gradient else 0.0

    block_c = padded_features(features)
    kind = ("split " if split else "") + ("gradient" if gradient else "sums")
    block_m, block_n, warps, stages, per_sm = TILES[kind, block_c]
    blocks, tiles = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    kept = features if gradient else 1
    shares = shares_of(problems * rows, kept, problems * blocks, tiles, per_sm * multiprocessors(device))
    tiles_per_share = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, tiles_per_share)

    totals = torch.empty((2, 0 if second else shares, problems, rows), device=device, dtype=torch.float32)
    sums = totals
    if gradient:
        sums = torch.empty((shares, problems, rows, features), device=device, dtype=torch.float32)
    x_block, y_block = [block_m, block_c], [block_n, block_c]
    _sweep[(blocks, shares, problems)](
        TensorDescriptor.from_tensor(x.high, x_block), TensorDescriptor.from_tensor(x.low, x_block),
        TensorDescriptor.from_tensor(y.high, y_block), TensorDescriptor.from_tensor(y.low, y_block),
        totals if x_log2_sum is None else x_log2_sum, totals if y_log2_sum is None else y_log2_sum,
        sums, totals[0], totals[1],
        rows, columns, features, x.padded, y.padded, first, tiles_per_share, scale,
        scale - offset if in_operands else 0.0,
        OFFSET=offset, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        SECOND=second, PAIRED=paired, BOUNDED=bounded, SPLIT=split, GRADIENT=gradient,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return Partial(sums, totals[0], totals[1], 2.0**-offset)


def losses(
    x: Tensor,  # (D, R, C) raw, contiguous
    y: Tensor,  # (D, Y, C) raw, contiguous: the columns; if paired, x
    part: Partial,  # of the first pass
    temperature: float,
    *,
    first: int,  # row in y of the positive of row 0; 0 if paired
    paired: bool,
    gradient: bool,
) -> Losses:
    """Close the first pass."""
    problems, rows, features = x.shape
    loss, log2_sum, miss = torch.empty((3, problems, rows), device=x.device, dtype=torch.float32)
    dx = torch.empty((problems, rows if gradient else 0, features), device=x.device, dtype=torch.float32)
    block_c, shares = padded_features(features), part.totals.shape[0]
    block_r, chunk = finishing_blocks(problems * rows, block_c, x.device)
    _losses[(triton.cdiv(rows, block_r), problems)](
        x, y, part.sums, part.totals, part.shifts, loss, log2_sum, miss, dx,
        rows, y.shape[1], features, first, LOG2E / temperature, 1 / temperature,
        SHARES=shares, BLOCK_S=triton.next_power_of_2(shares), BLOCK_R=block_r, CHUNK=chunk,
        BLOCK_C=block_c, PAIRED=paired, GRADIENT=gradient, enable_fp_fusion=True,
    )  # fmt: skip
    return Losses(loss, log2_sum, miss, dx)


def gradients(
    x: Tensor,  # (D, R, C) raw, contiguous
    y: Tensor,  # (D, Y, C) raw, contiguous: the columns; if paired, x
    part: Partial,  # of the second pass
    miss: Tensor,  # (D, Y)
    temperature: float,
    *,
    first: int,  # row in y of the positive of row 0, if it has one; 0 if paired
    paired: bool,
) -> Tensor:
    """Close the second pass: the gradient of the sum of all losses to x, (D, R, C) fp32."""
    problems, rows, features = x.shape
    dx = torch.empty((problems, rows, features), device=x.device, dtype=torch.float32)
    block_c = padded_features(features)
    block_r, chunk = finishing_blocks(problems * rows, block_c, x.device)
    _gradients[(triton.cdiv(rows, block_r), problems)](
        x, y, part.sums, miss, dx, rows, y.shape[1], features, first, 1 / temperature, part.factor,
        SHARES=part.sums.shape[0], BLOCK_R=block_r, CHUNK=chunk, BLOCK_C=block_c,
        PAIRED=paired, enable_fp_fusion=True,
    )  # fmt: skip
    return dx
