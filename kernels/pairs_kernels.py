"""The Triton kernels of ``pairs``, whose docstring has the formulas and the names."""

from __future__ import annotations

import triton
import triton.language as tl

from moco_fast.kernels.common import (
    add_product,
    add_shares,
    cross_entropy,
    exp2_scaled,
    load_rows,
    product,
    row_norms,
    through_norm,
    unit_rows,
)


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
def sweep(
    x_high, x_rest,  # (D * X_PADDED, WIDTH) operands, see load_rows(); x_rest and y_rest if SPLIT
    y_high, y_rest,  # (D * Y_PADDED, WIDTH)
    x_log2_sum, y_log2_sum,  # (D, R), (D, M) fp32, if SECOND; x only if PAIRED too
    sums,  # (SHARES, D, R, C) fp32, if GRADIENT
    totals, shifts,  # (SHARES, D, R) fp32, unless SECOND
    R, M, C, X_PADDED, Y_PADDED, first, tiles_per_share, scale, fixed_shift,
    WIDTH: tl.constexpr, TMA: tl.constexpr,
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
    x_first, x_end = problem * X_PADDED + start, (problem + 1) * X_PADDED
    x = load_rows(x_high, x_first, x_end, WIDTH, BLOCK_M, BLOCK_C, TMA)
    x_low = load_rows(x_rest, x_first, x_end, WIDTH, BLOCK_M, BLOCK_C, TMA) if SPLIT else x

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
        y_first, y_end = problem * Y_PADDED + column, (problem + 1) * Y_PADDED
        y = load_rows(y_high, y_first, y_end, WIDTH, BLOCK_N, BLOCK_C, TMA)
        y_low = load_rows(y_rest, y_first, y_end, WIDTH, BLOCK_N, BLOCK_C, TMA) if SPLIT else y
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
            acc = add_product(acc, p, y, y_low, SPLIT, SPLIT)

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
def losses(
    x, y,  # (D, R, C), (D, Y, C) raw
    sums, totals, shifts,  # see sweep()
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
def gradients(
    x, y,  # (D, R, C), (D, Y, C) raw
    sums,  # see sweep()
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
        missed += tl.load(miss + problem * Y + first + row, mask=valid, other=0)
    total = add_shares(sums, sums, missed, at, inside, n, C, SHARES, CHUNK, SHIFTED=False)
    d_hat = (total * factor - missed[:, None] * y_hat) * inverse_t
    tl.store(dx + to, through_norm(d_hat, x_hat, size), mask=inside)
