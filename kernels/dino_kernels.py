"""The Triton kernels of ``dino``, whose docstring has the formulas and the names."""

from __future__ import annotations

import triton
import triton.language as tl

from moco_fast.kernels.common import (
    LN2,
    add_product,
    add_shares,
    exp2_scaled,
    load_rows,
    product,
    row_norms,
    through_norm,
    unit_rows,
)


@triton.jit
def sweep(
    x_high, x_rest,  # (N, WIDTH) operands, see load_rows(); every *_rest only if SPLIT
    y_high, y_rest,  # (P, WIDTH) prototypes of the model whose rows x are
    w_high, w_rest,  # (P, WIDTH) prototypes of the student, if TEACHER; else they are y
    center,  # (P,) fp32, if TEACHER
    sums,  # (SHARES, N, C) fp32, if MEAN
    totals, shifts,  # (SHARES, N) fp32
    N, P, C, tiles_per_share, scale,
    WIDTH: tl.constexpr, TMA: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, TEACHER: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Over a share of the prototypes: sum_p e_p w_p, sum_p e_p and the shift of e_p."""
    block, share = tl.program_id(0), tl.program_id(1)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tl.cdiv(P, BLOCK_N))
    start = block * BLOCK_M
    x = load_rows(x_high, start, N, WIDTH, BLOCK_M, BLOCK_C, TMA)
    x_low = load_rows(x_rest, start, N, WIDTH, BLOCK_M, BLOCK_C, TMA) if SPLIT else x

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Below any logit, but finite: a center of infinity masks prototypes, a whole tile perhaps.
    shift = tl.full((BLOCK_M,), -3e38, tl.float32)
    if TEACHER:
        # A tile ahead by hand: of Triton's asynchronous copies of so few values every product would wait.
        col = first * BLOCK_N + tl.arange(0, BLOCK_N)
        centers = tl.load(center + col, mask=col < P, other=0)
    for tile in range(first, last):
        column = tile * BLOCK_N
        y = load_rows(y_high, column, P, WIDTH, BLOCK_N, BLOCK_C, TMA)
        y_low = load_rows(y_rest, column, P, WIDTH, BLOCK_N, BLOCK_C, TMA) if SPLIT else y
        w, w_low = y, y_low
        if TEACHER:
            w = load_rows(w_high, column, P, WIDTH, BLOCK_N, BLOCK_C, TMA)
            w_low = load_rows(w_rest, column, P, WIDTH, BLOCK_N, BLOCK_C, TMA) if SPLIT else w
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = product(x, x_low, tl.trans(y), tl.trans(y_low), s, SPLIT, SPLIT)
        col = column + tl.arange(0, BLOCK_N)
        if TEACHER:
            s -= centers[None, :]
            centers = tl.load(center + BLOCK_N + col, mask=BLOCK_N + col < P, other=0)
        if not EVEN:
            s = tl.where((col < P)[None, :], s, float("-inf"))
        # Against the scaled maximum, less the offset: the largest exponential is 2^OFFSET.
        grown = tl.maximum(shift, tl.max(s, axis=1) * scale - OFFSET)
        rescale = tl.exp2(shift - grown)
        shift = grown
        p = exp2_scaled(s, scale, shift[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        if MEAN:
            acc *= rescale[:, None]
            acc = add_product(acc, p, w, w_low, SPLIT, SPLIT)

    row = start + tl.arange(0, BLOCK_M)
    at = share.to(tl.int64) * N + row
    tl.store(totals + at, total, mask=row < N)
    tl.store(shifts + at, shift, mask=row < N)
    if MEAN:
        # 32-bit offsets from one 64-bit address: as many addresses as sums would not fit in registers.
        first_row = sums + (share.to(tl.int64) * N + start) * C
        here, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_C)[None, :]
        tl.store(first_row + (here * C + c), acc, mask=(here < N - start) & (c < C))


@triton.jit
def _close(
    totals, shifts,  # (SHARES, N)
    row,  # (R,) int64
    N,
    SHARES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The sum of the exponentials of all shares, and its shift."""
    share = tl.arange(0, BLOCK_S)[None, :]
    at = share.to(tl.int64) * N + row[:, None]
    own = (share < SHARES) & (row < N)[:, None]
    total = tl.load(totals + at, mask=own, other=0)
    shift = tl.load(shifts + at, mask=own, other=float("-inf"))
    top = tl.max(shift, axis=1)
    return tl.sum(total * tl.exp2(shift - top[:, None]), axis=1), top


@triton.jit
def finish(
    student,  # (N, C) raw
    t_sums, t_totals, t_shifts, s_sums, s_totals, s_shifts,  # of the sweeps; s_sums if GRADIENT
    loss,  # (N,) fp32
    tops, shares_of_one,  # (2, N) fp32: shift and 2^OFFSET / sum of the exponentials, student and teacher
    ds,  # (N, C) fp32, if GRADIENT
    N, C, inverse_t, lift,
    T_SHARES: tl.constexpr, S_SHARES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    valid = row < N
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = valid[:, None] & (col < C)
    to = row[:, None] * C + col
    s_row = tl.load(student + to, mask=inside, other=0).to(tl.float32)
    size = row_norms(s_row)
    s_hat = unit_rows(s_row, size)

    t_total, t_top = _close(t_totals, t_shifts, row, N, T_SHARES, BLOCK_T)
    s_total, s_top = _close(s_totals, s_shifts, row, N, S_SHARES, BLOCK_S)
    wanted = add_shares(t_sums, t_shifts, t_top, row, inside, N, C, T_SHARES, CHUNK, SHIFTED=True)
    wanted /= t_total[:, None]
    value = (tl.log2(s_total) + s_top) * LN2 - tl.sum(wanted * s_hat, axis=1) * inverse_t
    tl.store(loss + row, value, mask=valid)
    tl.store(tops + row, s_top, mask=valid)
    tl.store(tops + N + row, t_top, mask=valid)
    tl.store(shares_of_one + row, lift / s_total, mask=valid)
    tl.store(shares_of_one + N + row, lift / t_total, mask=valid)
    if GRADIENT:
        found = add_shares(s_sums, s_shifts, s_top, row, inside, N, C, S_SHARES, CHUNK, SHIFTED=True)
        ds_hat = (found / s_total[:, None] - wanted) * inverse_t
        tl.store(ds + to, through_norm(ds_hat, s_hat, size), mask=inside)


@triton.jit
def prototypes(
    w_high, w_rest, v_high, v_rest,  # (P, WIDTH) operands of student and teacher; every *_rest only if SPLIT
    s_high, s_rest, t_high, t_rest,  # (N, WIDTH) operands
    center,  # (P,) fp32
    tops, shares_of_one,  # (2, N), see finish()
    dw,  # (P, C) fp32
    P, N, C, s_scale, t_scale, factor,
    WIDTH: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradient to BLOCK_M prototypes, from all rows."""
    start = tl.program_id(0) * BLOCK_M
    w = load_rows(w_high, start, P, WIDTH, BLOCK_M, BLOCK_C, TMA)
    w_low = load_rows(w_rest, start, P, WIDTH, BLOCK_M, BLOCK_C, TMA) if SPLIT else w
    v = load_rows(v_high, start, P, WIDTH, BLOCK_M, BLOCK_C, TMA)
    v_low = load_rows(v_rest, start, P, WIDTH, BLOCK_M, BLOCK_C, TMA) if SPLIT else v
    mine = start + tl.arange(0, BLOCK_M)
    centers = tl.load(center + mine, mask=mine < P, other=0)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for column in range(0, N, BLOCK_N):
        x = load_rows(s_high, column, N, WIDTH, BLOCK_N, BLOCK_C, TMA)
        x_low = load_rows(s_rest, column, N, WIDTH, BLOCK_N, BLOCK_C, TMA) if SPLIT else x
        y = load_rows(t_high, column, N, WIDTH, BLOCK_N, BLOCK_C, TMA)
        y_low = load_rows(t_rest, column, N, WIDTH, BLOCK_N, BLOCK_C, TMA) if SPLIT else y
        t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        t = product(v, v_low, tl.trans(y), tl.trans(y_low), t, SPLIT, SPLIT)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = product(w, w_low, tl.trans(x), tl.trans(x_low), s, SPLIT, SPLIT)
        col = column + tl.arange(0, BLOCK_N)
        s_top = tl.load(tops + col, mask=col < N, other=float("inf"))  # exp2(-inf): no weight
        t_top = tl.load(tops + N + col, mask=col < N, other=float("inf"))
        s_one = tl.load(shares_of_one + col, mask=col < N, other=0)
        t_one = tl.load(shares_of_one + N + col, mask=col < N, other=0)
        miss = exp2_scaled(s, s_scale, s_top[None, :]) * s_one[None, :]
        miss -= exp2_scaled(t - centers[:, None], t_scale, t_top[None, :]) * t_one[None, :]
        acc = add_product(acc, miss, x, x_low, SPLIT, SPLIT)

    first_row = dw + start.to(tl.int64) * C
    here, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_C)[None, :]
    tl.store(first_row + (here * C + c), acc * factor, mask=(here < P - start) & (c < C))
