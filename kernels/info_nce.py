"""InfoNCE against a queue, loss and gradient in one pass over it.

With q^, k^ the normalised rows and s_j = q^.n_j / T::

    loss = logsumexp(s_0, s_1, ..., s_K) - s_0,                       s_0 = q^.k^ / T
    dq^  = (sum_j p_j n_j - (1 - p_0) k^) / T,    dq = (dq^ - q^ (q^.dq^)) / |q|

Three launches. ``_prepare`` normalises q into 16-bit operands and computes the
positive in fp32. ``_sweep`` is flash attention with V = K = queue: a program
holds BLOCK_M queries and walks its share of the queue, since N is far smaller
than K and a grid over queries alone would leave the GPU idle; it writes an
unnormalised sum (N, C), its denominator and its shift. ``_finish`` adds the
shares in a fixed order, so the result is bitwise repeatable.

The N x K logits never reach memory. Traffic: the queue once per BLOCK_M
queries (from L2 after the first), 2 K C bytes in 16 bit; 4 N K C FLOP; N K
exponentials; at most SCRATCH_BYTES of partial sums written and read.

Unit rows bound s by 1/T, so a constant shift replaces the running maximum where
the exponentials of cosines around 0 fit the operand type (``FIXED_SHIFT_FROM``).
A program whose sums came out infinite, of rows longer than 1, or so small that
fp16 held few of their digits (``LEAST``), walks again with a running maximum.

On Hopper csrc/info_nce_sweep.h can take the place of ``_prepare`` and ``_sweep``: ``by_hand``.

Reference: moco_fast.reference.info_nce.  Tests: tests/test_info_nce.py, tests/test_info_nce_sweep.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import native
from moco_fast.kernels import info_nce_sweep
from moco_fast.kernels.candidates import Tiles, candidates
from moco_fast.kernels.common import (
    LOG2E,
    add_product,
    add_shares,
    cross_entropy,
    exp2_scaled,
    finishing_blocks,
    has_tma,
    load_rows,
    multiprocessors,
    operand_dtype,
    padded_features,
    product,
    row_blocks,
    row_norms,
    shares_of,
    store_operand,
    through_norm,
    unit_rows,
)
from moco_fast.kernels.operands import aligned

# (BLOCK_M, BLOCK_N, warps, stages, programs per multiprocessor) by (rows class, padded C).
# Not measured on a GPU yet: chosen so that nothing spills and no wgmma waits for another (tests/test_aot.py).
# With 512 features a queue of another type than the operands' does spill, up to 352 bytes per thread.
TILES = {
    ("few", 32): (64, 64, 4, 4, 3),
    ("few", 64): (64, 64, 4, 4, 3),
    ("few", 128): (64, 64, 4, 3, 3),
    ("few", 256): (64, 64, 8, 2, 1),
    ("few", 512): (64, 32, 8, 2, 1),
    ("many", 32): (128, 64, 8, 4, 2),
    ("many", 64): (128, 64, 8, 3, 2),
    ("many", 128): (128, 64, 8, 3, 1),
    ("many", 256): (64, 64, 8, 2, 1),
    ("many", 512): (64, 32, 8, 2, 1),
}
# Before sm_90 the operands of every product pass through registers.
OLDER_TILES = {128: (64, 64, 8, 3, 1), 256: (64, 32, 8, 2, 1), 512: (32, 32, 8, 2, 1)}

# Precision "highest" holds every operand twice. From 256 features on registers spill: exact, but slow.
SPLIT_TILES = {128: (128, 32, 8, 3, 1), 256: (32, 32, 8, 2, 1), 512: (32, 16, 8, 2, 1)}
OLDER_SPLIT_TILES = SPLIT_TILES | {128: (64, 32, 8, 2, 1)}

SCRATCH_BYTES = 8_000_000  # of partial sums, of all that the op allocates nearly everything

# Exponentials are scaled by 2^15, the largest power of two in fp16, so that the small ones do not vanish.
OFFSET = {torch.float16: 15.0, torch.bfloat16: 0.0}

# Smallest temperature of the fixed shift, by precision. With fp16 it is where queries of random features stay
# clear of LEAST; bf16 has fp32's range, which holds exp from -1/T to 1/T.
FIXED_SHIFT_FROM = {"highest": 0.1, "high": 0.06, "medium": 0.025}
# Mean of fp16 exponentials below which a fixed shift is given up. fp16 rounds small values to multiples of
# 2^-24: at this mean that is 2^-14 of them, and 2^-19 where pairs of fp16 are to hold fp32's digits.
LEAST, LEAST_OF_PAIRS = tl.constexpr(2.0**-10), tl.constexpr(2.0**-5)


@triton.jit
def _prepare(
    q, k,  # (N, C) raw
    q_high, q_low,  # (N, WIDTH) operands; q_low only if SPLIT
    q_norm, k_norm, pos,  # (N,) fp32
    N, C,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (col < C)
    at = row.to(tl.int64) * C + col
    q_row = tl.load(q + at, mask=inside, other=0).to(tl.float32)
    k_row = tl.load(k + at, mask=inside, other=0).to(tl.float32)
    q_size, k_size = row_norms(q_row), row_norms(k_row)
    q_hat, k_hat = unit_rows(q_row, q_size), unit_rows(k_row, k_size)
    tl.store(q_norm + row, q_size, mask=row < N)
    tl.store(k_norm + row, k_size, mask=row < N)
    tl.store(pos + row, tl.sum(q_hat * k_hat, axis=1, keep_dims=True), mask=row < N)

    to = row.to(tl.int64) * WIDTH + col
    store_operand(q_high, q_low, to, q_hat, (row < N) & (col < WIDTH), SPLIT)


@triton.jit
def _walk(
    q, q_low,  # (BLOCK_M, BLOCK_C) operands
    queue,  # (K, WIDTH), see load_rows()
    positive,  # (BLOCK_M,) fp32
    first, last, K, scale, fixed_shift,
    WIDTH: tl.constexpr, TMA: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    ONLINE: tl.constexpr, SPLIT: tl.constexpr, SPLIT_QUEUE: tl.constexpr,
    DQ: tl.constexpr, SUMS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Over a share of tiles: sum_j p_j n_j, sum_j p_j, shift, sum of cosines, cosines above the positive."""
    M: tl.constexpr = q.shape[0]
    acc = tl.zeros((M, q.shape[1]), tl.float32)
    total = tl.zeros((M,), tl.float32)
    shift = tl.full((M,), float("-inf"), tl.float32) if ONLINE else tl.zeros((M,), tl.float32) + fixed_shift
    cosines = tl.zeros((M,), tl.float32)
    above = tl.zeros((M,), tl.int32)
    for tile in range(first, last):
        rows = load_rows(queue, tile * BLOCK_N, K, WIDTH, BLOCK_N, q.shape[1], TMA)
        n = rows.to(q.dtype)
        n_low = (rows.to(tl.float32) - n.to(tl.float32)).to(q.dtype) if SPLIT_QUEUE else n
        s = tl.zeros((M, BLOCK_N), tl.float32)
        s = product(q, q_low, tl.trans(n), tl.trans(n_low), s, SPLIT, SPLIT_QUEUE)
        if not EVEN:
            valid = (tile * BLOCK_N + tl.arange(0, BLOCK_N) < K)[None, :]
            if SUMS:
                cosines += tl.sum(tl.where(valid, s, 0.0), axis=1)
            s = tl.where(valid, s, float("-inf"))
        elif SUMS:
            cosines += tl.sum(s, axis=1)
        if RANKS:
            above += tl.sum((s > positive[:, None]).to(tl.int32), axis=1)
        if ONLINE:
            # Against the scaled maximum, less the offset: the largest exponential is 2^OFFSET.
            grown = tl.maximum(shift, tl.max(s, axis=1) * scale - OFFSET)
            rescale = tl.exp2(shift - grown)
            total *= rescale
            if DQ:
                acc *= rescale[:, None]
            shift = grown
        p = exp2_scaled(s, scale, shift[:, None])
        total += tl.sum(p, axis=1)
        if DQ:
            acc = add_product(acc, p, n, n_low, SPLIT, SPLIT_QUEUE)
    return acc, total, shift, cosines, above


@triton.jit
def _sweep(
    q_high, q_low,  # (N, WIDTH) operands, see load_rows()
    queue,  # (K, WIDTH), see load_rows()
    pos,  # (N,) fp32
    sums,  # (SHARES, N, C) fp32, if DQ
    totals, shifts, cosines,  # (SHARES, N) fp32; cosines if SUMS
    ranks,  # (SHARES, N) int32, if RANKS
    N, K, C, steps_per_share, scale, fixed_shift,
    WIDTH: tl.constexpr, TMA: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr, ONLINE: tl.constexpr, SPLIT: tl.constexpr, SPLIT_QUEUE: tl.constexpr,
    DQ: tl.constexpr, SUMS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    block, share = tl.program_id(0), tl.program_id(1)
    first = share * steps_per_share
    last = tl.minimum(first + steps_per_share, tl.cdiv(K, BLOCK_N))
    q = load_rows(q_high, block * BLOCK_M, N, WIDTH, BLOCK_M, BLOCK_C, TMA)
    q_rest = load_rows(q_low, block * BLOCK_M, N, WIDTH, BLOCK_M, BLOCK_C, TMA) if SPLIT else q
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    positive = tl.load(pos + row, mask=row < N, other=0)
    acc, total, shift, cosine, above = _walk(
        q, q_rest, queue, positive, first, last, K, scale, fixed_shift,
        WIDTH, TMA, OFFSET, BLOCK_N, EVEN, ONLINE, SPLIT, SPLIT_QUEUE, DQ, SUMS, RANKS,
    )  # fmt: skip
    if not ONLINE:
        # Rows of the queue longer than 1, or all of them far from a query. NaN inputs end here too, and stay.
        fits = total < float("inf")
        if DQ:
            fits &= tl.sum(tl.abs(acc), axis=1) < float("inf")
            if OFFSET > 0:
                columns = tl.minimum(last * BLOCK_N, K) - first * BLOCK_N
                fits &= total >= (LEAST_OF_PAIRS if SPLIT else LEAST) * columns
        if tl.min((fits | (row >= N)).to(tl.int32), axis=0) == 0:
            acc, total, shift, cosine, above = _walk(
                q, q_rest, queue, positive, first, last, K, scale, fixed_shift,
                WIDTH, TMA, OFFSET, BLOCK_N, EVEN, True, SPLIT, SPLIT_QUEUE, DQ, SUMS, RANKS,
            )  # fmt: skip

    at = share.to(tl.int64) * N + row
    tl.store(totals + at, total, mask=row < N)
    tl.store(shifts + at, shift, mask=row < N)
    if SUMS:
        tl.store(cosines + at, cosine, mask=row < N)
    if RANKS:
        tl.store(ranks + at, above, mask=row < N)
    if DQ:
        # 32-bit offsets from one 64-bit address: as many addresses as sums would not fit in registers.
        first_row = sums + (share.to(tl.int64) * N + block * BLOCK_M) * C
        here = tl.arange(0, BLOCK_M)[:, None]
        col = tl.arange(0, BLOCK_C)[None, :]
        tl.store(first_row + (here * C + col), acc, mask=(here < N - block * BLOCK_M) & (col < C))


@triton.jit
def _finish(
    q, k,  # (N, C) raw
    q_norm, k_norm, pos,  # (N,)
    sums, totals, shifts, cosines, ranks,  # see _sweep
    loss, dq, rank, neg,  # (N,) fp32, (N, C) fp32, (N,) int64, (N,) fp32
    N, K, C, scale, inverse_t,
    SHARES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, DQ: tl.constexpr, SUMS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    valid = row < N
    share = tl.arange(0, BLOCK_S)[None, :]
    at = share.to(tl.int64) * N + row[:, None]
    own = (share < SHARES) & valid[:, None]
    total = tl.load(totals + at, mask=own, other=0)
    shift = tl.load(shifts + at, mask=own, other=float("-inf"))
    positive = tl.load(pos + row, mask=valid, other=0)
    s0 = positive * scale
    top = tl.maximum(tl.max(shift, axis=1), s0)
    negatives = tl.sum(total * tl.exp2(shift - top[:, None]), axis=1)
    value, sum_all = cross_entropy(negatives, s0, top)
    if SUMS:
        cosine = tl.sum(tl.load(cosines + at, mask=own, other=0), axis=1)
        tl.store(neg + row, cosine / K, mask=valid)
        value += 0 * cosine  # an infinite feature may have met exp(-inf) = 0
    if RANKS:
        above = tl.sum(tl.load(ranks + at, mask=own, other=0).to(tl.int64), axis=1)
        tl.store(rank + row, above, mask=valid)
    if DQ:
        col = tl.arange(0, BLOCK_C)[None, :]
        inside = valid[:, None] & (col < C)
        mean = add_shares(sums, shifts, top, row, inside, N, C, SHARES, CHUNK, SHIFTED=True)
        mean /= sum_all[:, None]
        to = row[:, None] * C + col
        q_row = tl.load(q + to, mask=inside, other=0).to(tl.float32)
        k_row = tl.load(k + to, mask=inside, other=0).to(tl.float32)
        size = tl.load(q_norm + row, mask=valid, other=1)[:, None]
        k_size = tl.load(k_norm + row, mask=valid, other=1)[:, None]
        q_hat, k_hat = unit_rows(q_row, size), unit_rows(k_row, k_size)
        dq_hat = (mean - (negatives / sum_all)[:, None] * k_hat) * inverse_t
        tl.store(dq + to, through_norm(dq_hat, q_hat, size), mask=inside)
        value += 0 * tl.sum(mean, axis=1)
    tl.store(loss + row, value, mask=valid)


def tiles_for(n: int, block_c: int, split: bool, device: torch.device) -> Tiles:
    """The entry of the tables for a batch of n rows padded to block_c features."""
    tma = has_tma(device)
    if split and block_c in SPLIT_TILES:
        return (SPLIT_TILES if tma else OLDER_SPLIT_TILES)[block_c]
    if block_c in OLDER_TILES and not tma:
        return OLDER_TILES[block_c]
    return TILES["few" if n <= 64 else "many", block_c]


def _candidates(few: bool, features: int) -> list[Tiles]:
    return candidates(
        (64,) if few else (64, 128),
        (16, 32) if features == 512 else (32, 64, 128),
        (2, 3) if features >= 256 else (3, 4) if few else (2, 3, 4),
        lambda block_m, block_n, stages: (block_m + stages * block_n) * features * 2,
        sums=features,
        scores=1,
        more_warps=few or features >= 256,
    )


CANDIDATES = {key: _candidates(key[0] == "few", key[1]) for key in TILES}


def tune_case(key: tuple[str, int]) -> Callable[[Tiles], Callable[[], object]]:
    """What bench/tune.py times: the headline sizes of a class, loss and gradient, from a 16-bit queue."""
    n, features = 32 if key[0] == "few" else 256, key[1]
    q, k = torch.randn(2, n, features, device="cuda").unbind()
    queue = torch.nn.functional.normalize(torch.randn(65536, features, device="cuda"), dim=1).half()
    return lambda tiles: lambda: info_nce(q, k, queue, 0.07, "high", True, False, tiles)


def _faster_by_hand(q: Tensor, queue: Tensor, precision: str) -> bool:
    return (
        q.is_cuda
        and ("few" if len(q) <= info_nce_sweep.FEW else "many") in info_nce_sweep.UNASKED
        and info_nce_sweep.READS.get(precision) == queue.dtype
        and native.cannot_serve("info_nce", (q, queue)) is None
    )


def info_nce(
    q: Tensor,  # (N, C)
    k: Tensor,  # (N, C)
    queue: Tensor,  # (K, C)
    temperature: float,
    precision: str,
    need_dq: bool,
    need_stats: bool,
    tiles: Tiles | None = None,
    by_hand: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.info_nce`.

    Args:
        tiles: in place of the tables' entry.
        by_hand: sweep with the kernel of info_nce_sweep.py, which has to serve these tensors; None: if it
            does and was measured to be faster.
    """
    if by_hand is None:
        by_hand = tiles is None and _faster_by_hand(q, queue, precision)
    q, k, queue = q.contiguous(), k.contiguous(), aligned(queue.contiguous())
    n, features = q.shape
    slots, width = queue.shape
    operand = operand_dtype(precision)
    split = precision == "highest"
    split_queue = split and queue.dtype != torch.float16
    offset, online = OFFSET[operand], temperature < FIXED_SHIFT_FROM[precision]
    with_dq = need_dq or by_hand
    sums_wanted = need_stats or not with_dq  # without dq nothing else would notice an infinite feature
    scale = LOG2E / temperature

    block_c = padded_features(features)
    if by_hand:
        block_m, block_n, together = info_nce_sweep.blocks_of(n)
        programs = multiprocessors(q.device) // together
    else:
        block_m, block_n, warps, stages, per_sm = tiles or tiles_for(n, block_c, split, q.device)
        if queue.element_size() == 4 and block_c == 128:
            per_sm = min(per_sm, 2)  # more do not fit beside each other with rows of fp32
        programs = per_sm * multiprocessors(q.device)
    blocks, steps = triton.cdiv(n, block_m), triton.cdiv(slots, block_n)
    shares = shares_of(n, features, blocks, steps, programs, SCRATCH_BYTES)
    steps_per_share = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, steps_per_share)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    q_norm, k_norm, pos, loss = (scratch(n) for _ in range(4))
    sums = scratch(shares, n, features) if with_dq else loss
    totals, shifts = scratch(shares, n), scratch(shares, n)
    cosines = scratch(shares, n) if sums_wanted else loss
    ranks = scratch(shares, n, dtype=torch.int32) if need_stats else loss
    dq = scratch(n if with_dq else 0, features)
    stats = n if need_stats else 0
    rank, neg = scratch(stats, dtype=torch.int64), scratch(n if sums_wanted else 0)

    if by_hand:
        native.info_nce_sweep(
            aligned(q), aligned(k), queue, (q_norm, k_norm, pos),
            (sums, totals, shifts, *((cosines, ranks) if need_stats else ())),
            steps_per_share, (scale, scale - offset, offset, LEAST.value if offset else 0.0), online,
        )  # fmt: skip
    else:
        q_high = scratch(n, width, dtype=operand)
        q_low = scratch(n, width, dtype=operand) if split else q_high
        rows = max(1, 4096 // block_c)
        tma = has_tma(q.device)
        _prepare[(triton.cdiv(n, rows),)](
            q, k, q_high, q_low, q_norm, k_norm, pos, n, features,
            WIDTH=width, BLOCK_R=rows, BLOCK_C=block_c, SPLIT=split, enable_fp_fusion=True,
        )  # fmt: skip
        _sweep[(blocks, shares)](
            *row_blocks((q_high, q_low, queue), (block_m, block_m, block_n), block_c, tma),
            pos, sums, totals, shifts, cosines, ranks,
            n, slots, features, steps_per_share, scale, scale - offset,
            WIDTH=width, TMA=tma, OFFSET=offset, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
            EVEN=slots % block_n == 0, ONLINE=online, SPLIT=split, SPLIT_QUEUE=split_queue,
            DQ=with_dq, SUMS=sums_wanted, RANKS=need_stats,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    block_r, chunk, finishing_warps = finishing_blocks(n, block_c, q.device)
    _finish[(triton.cdiv(n, block_r),)](
        q, k, q_norm, k_norm, pos, sums, totals, shifts, cosines, ranks, loss, dq, rank, neg,
        n, slots, features, scale, 1 / temperature,
        SHARES=shares, BLOCK_S=triton.next_power_of_2(shares), BLOCK_R=block_r, CHUNK=chunk,
        BLOCK_C=block_c, DQ=with_dq, SUMS=sums_wanted, RANKS=need_stats, num_warps=finishing_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return loss, dq[: n if need_dq else 0], rank, pos[:stats], neg[:stats]
