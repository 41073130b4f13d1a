"""Rows against the columns of one batch: the two passes that ``nt_xent`` and ``contrast`` are made of.

X (R, C) and Y (M, C) are normalised rows, s_ij = x_i.y_j / T. Every row has one
positive column; the others are its negatives, except its own where the columns
are the rows themselves (PAIRED, see below). With L_i the log-sum-exp of row i::

    first pass    l_i = sum_j exp(s_ij)                        over the negatives j of i
                  g_i = sum_j exp(s_ij) y_j                    if GRADIENT
    second pass   g_i = sum_j exp(s_ij - L_j) y_j              L of the columns, given
                  g_i = sum_j (exp(s_ij - L_i) + exp(s_ij - L_j)) y_j       if PAIRED

The second pass is the gradient to rows that were the columns of a first pass:
no atomics, and across ranks two numbers a row would have to travel, not
gradients. The positive is left out of every sum; ``losses`` and ``gradients``
add its part, computed in fp32 from the raw rows: ``1 - p`` of the positive is l
/ (l + e), never a subtraction.

The positive of row i is column ``first + i``. PAIRED rows are two views of R / 2
images one after the other, and are columns ``first`` to ``first + R`` of Y: the
positive is the other view. ``first`` is 0 unless Y was gathered from several ranks.

Several independent problems of one shape (D, the third axis of the grid) share
a launch. A program holds BLOCK_M rows and walks its share of the columns; a
small kernel adds the shares in a fixed order, so results are bitwise repeatable.
The R x M similarities never reach memory. A pass makes 2 R M C FLOP, 4 with a
gradient, and R M exponentials.

Rows are of unit norm, so -1/T <= s <= 1/T and a constant shift replaces the
running maximum where exponentials keep their digits in all of that range
(``FIXED_SHIFT_FROM``).

Kernels: pairs_kernels.py.  Tests: tests/test_pairs.py, test_nt_xent.py, test_contrast.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moco_fast.kernels import operands, pairs_kernels
from moco_fast.kernels.candidates import Tiles, candidates
from moco_fast.kernels.common import (
    LOG2E,
    finishing_blocks,
    has_tma,
    multiprocessors,
    padded_features,
    row_blocks,
    shares_of,
)
from moco_fast.kernels.operands import Operand

# (BLOCK_M, BLOCK_N, warps, stages, programs per multiprocessor) by (pass, padded C); "split" is precision
# "highest". Only the gradient of split operands of 512 features spills whatever the tiles: least so where
# they are too small for wgmma. Not measured on a GPU yet: chosen so that nothing else spills and no wgmma
# waits for another (tests/test_aot.py).
TILES = {
    ("sums", 32): (128, 128, 8, 4, 2),
    ("sums", 64): (128, 128, 8, 4, 2),
    ("sums", 128): (128, 128, 8, 3, 1),
    ("sums", 256): (128, 64, 8, 3, 1),
    ("sums", 512): (64, 64, 4, 2, 1),
    ("gradient", 32): (128, 64, 8, 3, 2),
    ("gradient", 64): (128, 32, 8, 4, 2),
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
    ("split gradient", 512): (16, 16, 8, 2, 1),
}
# Before sm_90 the operands of every product pass through registers, and some GPUs have 99 KB for all tiles.
OLDER_TILES = {
    ("sums", 32): (128, 128, 8, 4, 1),
    ("sums", 64): (128, 128, 8, 4, 1),
    ("sums", 256): (128, 64, 8, 2, 1),
    ("sums", 512): (64, 32, 8, 2, 1),
    ("gradient", 32): (128, 32, 8, 4, 2),
    ("gradient", 64): (128, 64, 8, 3, 1),
    ("split sums", 32): (128, 64, 8, 4, 1),
    ("split sums", 128): (128, 64, 8, 2, 1),
    ("split sums", 256): (32, 64, 8, 2, 1),
    ("split sums", 512): (16, 32, 8, 2, 1),
    ("split gradient", 32): (128, 32, 8, 3, 1),
    ("split gradient", 128): (128, 16, 8, 3, 1),
    ("split gradient", 256): (32, 32, 8, 2, 1),
}
PADDING = 128  # a multiple of every block of rows or columns

# Exponentials are operands too, scaled by a power of two so that fp16 does not lose the small ones: before
# that they are up to 1 in the first pass, up to 2 in the second.
OFFSET = {torch.float16: (15.0, 14.0), torch.bfloat16: (0.0, 0.0)}

# Smallest temperature of the fixed shift, for exponentials that stay in fp32 or are operands: pairs of fp16,
# fp16 or bf16. With fp16, whose small values are multiples of 2^-24, exp(-2/T) 2^15 has to be 2^-4 at least
# for the digits of fp32, 2^-13 for those of fp16.
FIXED_SHIFT_FROM = {"sums": 0.025, "highest": 0.16, "high": 0.11, "medium": 0.025}


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


def tiles_for(kind: str, block_c: int, tma: bool) -> Tiles:
    """The entry of the tables for a pass over rows padded to block_c features."""
    return TILES[kind, block_c] if tma else (TILES | OLDER_TILES)[kind, block_c]


def operand(
    x: Tensor,  # (D, R, C) raw, contiguous
    precision: str,
) -> Operand:
    """Normalised rows, of each problem padded for blocks of any height."""
    return operands.operand(x, precision, unit=True, padding=PADDING)


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
    tiles: Tiles | None = None,
) -> Partial:
    """One pass over all columns; ``tiles`` in place of the tables' entry."""
    second, split = y_log2_sum is not None, x.low is not x.high
    dtype, device = x.high.dtype, x.high.device
    scale = LOG2E / temperature
    # Exponentials of the first pass with a gradient are operands before they are normalised.
    in_operands = gradient and not second
    precision = "highest" if split else "medium" if dtype == torch.bfloat16 else "high"
    bounded = temperature >= FIXED_SHIFT_FROM[precision if in_operands else "sums"]
    offset = OFFSET[dtype][1 if second else 0] if gradient else 0.0

    block_c = padded_features(features)
    kind = ("split " if split else "") + ("gradient" if gradient else "sums")
    tma, width = has_tma(device), x.high.shape[1]
    block_m, block_n, warps, stages, per_sm = tiles or tiles_for(kind, block_c, tma)
    blocks, steps = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    kept = features if gradient else 1
    shares = shares_of(problems * rows, kept, problems * blocks, steps, per_sm * multiprocessors(device))
    steps_per_share = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, steps_per_share)

    totals = torch.empty((2, 0 if second else shares, problems, rows), device=device, dtype=torch.float32)
    sums = totals
    if gradient:
        sums = torch.empty((shares, problems, rows, features), device=device, dtype=torch.float32)
    pairs_kernels.sweep[(blocks, shares, problems)](
        *row_blocks((x.high, x.low, y.high, y.low), (block_m, block_m, block_n, block_n), block_c, tma),
        totals if x_log2_sum is None else x_log2_sum, totals if y_log2_sum is None else y_log2_sum,
        sums, totals[0], totals[1],
        rows, columns, features, len(x.high) // problems, len(y.high) // problems, first, steps_per_share,
        scale, scale - offset if in_operands else 0.0,
        WIDTH=width, TMA=tma, OFFSET=offset, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        SECOND=second, PAIRED=paired, BOUNDED=bounded, SPLIT=split, GRADIENT=gradient,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return Partial(sums, totals[0], totals[1], 2.0**-offset)


def losses(
    x: Tensor,  # (D, R, C) raw, contiguous
    y: Tensor,  # (D, Y, C) raw, contiguous: the columns
    part: Partial,  # of the first pass
    temperature: float,
    *,
    first: int,  # see sweep()
    paired: bool,
    gradient: bool,
) -> Losses:
    """Close the first pass."""
    problems, rows, features = x.shape
    loss, log2_sum, miss = torch.empty((3, problems, rows), device=x.device, dtype=torch.float32)
    dx = torch.empty((problems, rows if gradient else 0, features), device=x.device, dtype=torch.float32)
    block_c, shares = padded_features(features), part.totals.shape[0]
    block_r, chunk, warps = finishing_blocks(problems * rows, block_c, x.device)
    pairs_kernels.losses[(triton.cdiv(rows, block_r), problems)](
        x, y, part.sums, part.totals, part.shifts, loss, log2_sum, miss, dx,
        rows, y.shape[1], features, first, LOG2E / temperature, 1 / temperature,
        SHARES=shares, BLOCK_S=triton.next_power_of_2(shares), BLOCK_R=block_r, CHUNK=chunk,
        BLOCK_C=block_c, PAIRED=paired, GRADIENT=gradient, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return Losses(loss, log2_sum, miss, dx)


def gradients(
    x: Tensor,  # (D, R, C) raw, contiguous
    y: Tensor,  # (D, Y, C) raw, contiguous: the columns
    part: Partial,  # of the second pass
    miss: Tensor,  # (D, Y)
    temperature: float,
    *,
    first: int,  # see sweep(); below 0 the first rows have no positive
    paired: bool,
) -> Tensor:
    """Close the second pass: the gradient of the sum of all losses to x, (D, R, C) fp32."""
    problems, rows, features = x.shape
    dx = torch.empty((problems, rows, features), device=x.device, dtype=torch.float32)
    block_c = padded_features(features)
    block_r, chunk, warps = finishing_blocks(problems * rows, block_c, x.device)
    pairs_kernels.gradients[(triton.cdiv(rows, block_r), problems)](
        x, y, part.sums, miss, dx, rows, y.shape[1], features, first, 1 / temperature, part.factor,
        SHARES=part.sums.shape[0], BLOCK_R=block_r, CHUNK=chunk, BLOCK_C=block_c,
        PAIRED=paired, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dx


def _candidates(kind: str, features: int) -> list[Tiles]:
    split, gradient = "split" in kind, "gradient" in kind
    width = 2 * features * (2 if split else 1)  # bytes of a row
    if gradient:
        columns = (16,) if width >= 1024 else (16, 32, 64) if features == 256 else (32, 64)
    else:
        columns = (16, 32, 64) if features >= 256 else (64, 128)
    small = split and gradient and features == 512  # too small for wgmma
    return candidates(
        (16, 32) if small else (64, 128),
        columns,
        (2, 3) if features >= 128 else (3, 4),
        lambda block_m, block_n, stages: (block_m + stages * block_n) * width,
        sums=features if gradient else 0,
        scores=1,
        more_warps=small or (features >= 256 and not split),
    )


CANDIDATES = {key: _candidates(*key) for key in TILES}


def tune_case(
    key: tuple[str, int], rows: int = 8192, device: str = "cuda"
) -> Callable[[Tiles], Callable[[], Partial]]:
    """What bench/tune.py times: the pass as nt_xent makes it over two views of 4096 images."""
    kind, features = key
    precision = "highest" if "split" in kind else "high"
    x = operand(torch.randn(1, rows, features, device=device), precision)
    log2_sum = torch.full((1, rows), 20.0, device=device) if "gradient" in kind else None

    def make(tiles: Tiles) -> Callable[[], Partial]:
        return lambda: sweep(
            x, x, 1, rows, rows, features, 0.1, first=0, paired=True, gradient="gradient" in kind,
            x_log2_sum=log2_sum, y_log2_sum=log2_sum, tiles=tiles,
        )  # fmt: skip

    return make
