"""Batch normalisation of S consecutive parts of a batch, each with its own statistics, without copying parts.

Over the M values that channel c has in part s, with x^ = (x - mean) / sqrt(var + eps)::

    forward   mean = sum(x) / M,  var = sum((x - mean)^2) / M,  y = x^ * weight + bias
    backward  db = sum_s sum(dy),  dw = sum_s sum(dy x^)
              dx = weight / sqrt(var + eps) * (dy - sum(dy) / M - x^ sum(dy x^) / M)

Two launches each: one takes sums over shares of the parts, the next adds the
shares up in a fixed order, every program for its own channels, and writes y or
dx. x is read twice and y written; x and dy are read twice and dx written: 3 and
5 values of traffic, less what the L2 still holds, for about 10 FLOP per value
and pass. The sums take 8 bytes per share and channel.

A tensor is (S, R, C, L) in memory, R rows per part: L positions of a channel
together if contiguous; if channels-last R counts positions and L = 1. A tile is
rows of several channels or of several positions of one. Statistics are
Welford's in every lane, of what values are above one of the part that is no
outlier: neither a large mean nor an outlier costs digits. No atomics: the same
bits every time.

Reference: moco_fast.reference.split_batch_norm.  Tests: tests/test_split_batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels.common import multiprocessors

# (elements per tile, most columns of it, warps, programs per multiprocessor), for channels that lie together
# in a row and for positions that do. Not measured on a GPU yet.
TILES = {"together": (2048, 64, 4, 4), "apart": (2048, 1024, 4, 4)}

SHARES = 16  # sums of shares that a program reads at a time


@triton.jit
def _columns(C, L, ALONG, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr):
    """This program's columns of a row of C L values, which exist, and their channel: (1, X) or (1, 1)."""
    at = tl.arange(0, BLOCK_X)[None, :]
    if TOGETHER:
        column = tl.program_id(0) * BLOCK_X + at
        inside = column < C
        channel = column
    else:
        channel = tl.program_id(0) // ALONG + tl.zeros((1, 1), tl.int32)
        position = tl.program_id(0) % ALONG * BLOCK_X + at
        inside = position < L
        column = channel * L + position
    return column, inside, channel


@triton.jit
def _over_tile(x, TOGETHER: tl.constexpr):
    """The sum over what a tile holds of a channel, (1, X) or (1, 1)."""
    x = tl.sum(x, axis=0, keep_dims=True)
    if not TOGETHER:
        x = tl.sum(x, axis=1, keep_dims=True)
    return x


@triton.jit
def _share_of(ALONG):
    """Which share of its channels' values this program has."""
    return tl.program_id(1) * ALONG + tl.program_id(0) % ALONG


@triton.jit
def _pivot(x, part, R, C, L, channel):
    """A value of the part, by channel, that is no outlier: the median of its first, middle and last one."""
    known = channel < C
    base = x + tl.cast(part, tl.int64) * R * C * L + channel * L
    row = tl.cast(C, tl.int64) * L
    first = tl.load(base, mask=known, other=0).to(tl.float32)
    middle = tl.load(base + R // 2 * row + L // 2, mask=known, other=0).to(tl.float32)
    last = tl.load(base + (R - 1) * row + (L - 1), mask=known, other=0).to(tl.float32)
    low, high = tl.minimum(first, middle), tl.maximum(first, middle)
    return tl.maximum(low, tl.minimum(high, last))


@triton.jit
def _statistics(
    x,  # (S, R, C, L)
    found,  # (2, S, SHARES, C): mean above the part's pivot, squares about it
    R, C, L, ALONG, steps, shares,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    column, inside, channel = _columns(C, L, ALONG, BLOCK_X, TOGETHER)
    part = tl.program_id(2)
    pivot = _pivot(x, part, R, C, L, channel)
    row = tl.program_id(1) * steps * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    size = tl.where(inside, tl.minimum(tl.maximum((R - row + BLOCK_R - 1) // BLOCK_R, 0), steps), 0).to(
        tl.float32
    )
    mean = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    seen = 0.0
    for _ in range(0, steps):
        seen += 1.0
        mask = inside & (row < R)
        at = (tl.cast(part, tl.int64) * R + row) * C * L + column
        value = tl.load(x + at, mask=mask, other=0).to(tl.float32) - pivot
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / seen)
        squares += delta * (value - mean)
        row += BLOCK_R
    whole = _over_tile(size * mean, TOGETHER) / tl.maximum(_over_tile(size, TOGETHER), 1.0)
    off = mean - whole
    squares = _over_tile(squares + size * off * off, TOGETHER)
    into = found + (tl.cast(part, tl.int64) * shares + _share_of(ALONG)) * C + channel
    tl.store(into, whole, mask=channel < C)
    tl.store(into + tl.num_programs(2).to(tl.int64) * shares * C, squares, mask=channel < C)


@triton.jit
def _joined(
    found, R, C, L, ALONG, steps, shares, channel,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Mean above the pivot and biased variance of this program's channels in its part."""
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2).to(tl.int64)
    values = 1.0 * R * L
    mean = tl.zeros(channel.shape, tl.float32)
    var = tl.zeros(channel.shape, tl.float32)
    for squares in tl.static_range(2):  # the mean of all shares, then the squares about it
        for start in range(0, shares, CHUNK):
            share = start + tl.arange(0, CHUNK)[:, None]
            rows = tl.minimum(R - share // ALONG * (steps * BLOCK_R), steps * BLOCK_R)
            size = rows.to(tl.float32)
            if not TOGETHER:
                size *= tl.minimum(L - share % ALONG * BLOCK_X, BLOCK_X).to(tl.float32)
            mask = (share < shares) & (channel < C)
            at = found + (part * shares + share) * C + channel
            own = tl.load(at, mask=mask, other=0)
            if squares:
                rest = tl.load(at + parts * shares * C, mask=mask, other=0)
                rest += tl.where(mask, size * (own - mean) * (own - mean), 0.0)
                var += tl.sum(rest, axis=0, keep_dims=True) / values
            else:
                mean += tl.sum(tl.where(mask, size * own, 0.0), axis=0, keep_dims=True) / values
    return mean, var


@triton.jit
def _normalise(
    x, y,  # (S, R, C, L)
    weight, bias,  # (C), if HAS_WEIGHT, HAS_BIAS
    found,  # (2, S, SHARES, C)
    means, variances,  # (S, C)
    eps, R, C, L, ALONG, steps, shares,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column, inside, channel = _columns(C, L, ALONG, BLOCK_X, TOGETHER)
    part = tl.program_id(2)
    mean, var = _joined(
        found, R, C, L, ALONG, steps, shares, channel, BLOCK_R, BLOCK_X, TOGETHER, CHUNK
    )  # fmt: skip
    pivot = _pivot(x, part, R, C, L, channel)
    if _share_of(ALONG) == 0:
        tl.store(means + part * C + channel, pivot + mean, mask=channel < C)
        tl.store(variances + part * C + channel, var, mask=channel < C)
    scale = 1 / tl.sqrt(var + eps)
    if HAS_WEIGHT:
        scale *= tl.load(weight + channel, mask=channel < C, other=0).to(tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + channel, mask=channel < C, other=0).to(tl.float32)
    row = tl.program_id(1) * steps * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    for _ in range(0, steps):
        mask = inside & (row < R)
        at = (tl.cast(part, tl.int64) * R + row) * C * L + column
        value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
        result = ((value - pivot) - mean) * scale + offset
        tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)
        row += BLOCK_R


@triton.jit
def _sums(
    dy, x,  # (S, R, C, L)
    means,  # (S, C)
    found,  # (2, S, SHARES, C): sums of dy and of dy (x - mean)
    R, C, L, ALONG, steps, shares,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    column, inside, channel = _columns(C, L, ALONG, BLOCK_X, TOGETHER)
    part = tl.program_id(2)
    mean = tl.load(means + part * C + channel, mask=channel < C, other=0)
    row = tl.program_id(1) * steps * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    dot = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    for _ in range(0, steps):
        mask = inside & (row < R)
        at = (tl.cast(part, tl.int64) * R + row) * C * L + column
        grad = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
        total += grad
        dot += tl.where(mask, grad * (value - mean), 0.0)
        row += BLOCK_R
    into = found + (tl.cast(part, tl.int64) * shares + _share_of(ALONG)) * C + channel
    tl.store(into, _over_tile(total, TOGETHER), mask=channel < C)
    tl.store(into + tl.num_programs(2).to(tl.int64) * shares * C, _over_tile(dot, TOGETHER), mask=channel < C)


@triton.jit
def _added(found, part, C, shares, channel, CHUNK: tl.constexpr):
    """Sums over all shares of a part, in their order."""
    total = tl.zeros(channel.shape, tl.float32)
    for start in range(0, shares, CHUNK):
        share = start + tl.arange(0, CHUNK)[:, None]
        mask = (share < shares) & (channel < C)
        own = tl.load(found + (tl.cast(part, tl.int64) * shares + share) * C + channel, mask=mask, other=0)
        total += tl.sum(own, axis=0, keep_dims=True)
    return total


@triton.jit
def _gradient(
    dy, x, dx,  # (S, R, C, L)
    weight,  # (C), if HAS_WEIGHT
    means, variances,  # (S, C)
    found,  # (2, S, SHARES, C)
    dw, db,  # (C)
    eps, R, C, L, ALONG, steps, shares,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column, inside, channel = _columns(C, L, ALONG, BLOCK_X, TOGETHER)
    part = tl.program_id(2)
    dots = found + tl.num_programs(2).to(tl.int64) * shares * C
    if (part == 0) & (_share_of(ALONG) == 0):
        all_dy = tl.zeros(channel.shape, tl.float32)
        all_dot = tl.zeros(channel.shape, tl.float32)
        for other in range(0, tl.num_programs(2)):
            spread = tl.load(variances + other * C + channel, mask=channel < C, other=1)
            all_dy += _added(found, other, C, shares, channel, CHUNK)
            all_dot += _added(dots, other, C, shares, channel, CHUNK) / tl.sqrt(spread + eps)
        tl.store(db + channel, all_dy, mask=channel < C)
        tl.store(dw + channel, all_dot, mask=channel < C)

    values = 1.0 * R * L
    mean = tl.load(means + part * C + channel, mask=channel < C, other=0)
    inverse = 1 / tl.sqrt(tl.load(variances + part * C + channel, mask=channel < C, other=1) + eps)
    scale = inverse
    if HAS_WEIGHT:
        scale *= tl.load(weight + channel, mask=channel < C, other=0).to(tl.float32)
    shift = _added(found, part, C, shares, channel, CHUNK) / values
    slope = _added(dots, part, C, shares, channel, CHUNK) * inverse * inverse / values
    row = tl.program_id(1) * steps * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    for _ in range(0, steps):
        mask = inside & (row < R)
        at = (tl.cast(part, tl.int64) * R + row) * C * L + column
        grad = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
        result = scale * (grad - shift - (value - mean) * slope)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)
        row += BLOCK_R


class Plan(NamedTuple):
    """How a tensor is cut, from its shape and the device alone."""

    grid: tuple[int, int, int]
    sizes: dict[str, int]  # arguments of the kernels
    blocks: dict[str, int | bool]


def plan(x: Tensor, splits: int, tiles: tuple[int, int, int, int] | None = None) -> Plan:
    """Enough programs to fill the device, with a share each of the rows of some columns of a part."""
    rows, length = reference.runs(x)
    rows, channels, together = rows // splits, x.shape[1], length == 1
    elements, columns, warps, programs = tiles or TILES["together" if together else "apart"]
    width = channels if together else length
    block_x = min(triton.next_power_of_2(width), columns)
    block_r = min(max(1, elements // block_x), triton.next_power_of_2(rows))
    along = 1 if together else triton.cdiv(length, block_x)
    across = triton.cdiv(channels, block_x) if together else channels * along
    wanted = triton.cdiv(programs * multiprocessors(x.device), across * splits)
    steps = triton.cdiv(triton.cdiv(rows, block_r), wanted)
    downwards = triton.cdiv(rows, block_r * steps)
    return Plan(
        (across, downwards, splits),
        {"R": rows, "C": channels, "L": length, "ALONG": along, "steps": steps, "shares": along * downwards},
        {"BLOCK_R": block_r, "BLOCK_X": block_x, "TOGETHER": together, "num_warps": warps},
    )


def _scratch(x: Tensor, cut: Plan) -> Tensor:
    shape = (2, cut.grid[2], cut.sizes["shares"], cut.sizes["C"])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def split_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, splits: int, eps: float,
    tiles: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`moco_fast.reference.split_batch_norm`."""
    x = reference.dense(x)
    cut = plan(x, splits, tiles)
    y, found = torch.empty_like(x), _scratch(x, cut)
    mean, var = (torch.empty((splits, x.shape[1]), dtype=torch.float32, device=x.device) for _ in range(2))
    _statistics[cut.grid](x, found, **cut.sizes, **cut.blocks, enable_fp_fusion=True)
    _normalise[cut.grid](
        x, y, *(found if p is None else p.contiguous() for p in (weight, bias)), found, mean, var, eps,
        **cut.sizes, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **cut.blocks, CHUNK=SHARES,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y, mean, var


def split_batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    tiles: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`moco_fast.reference.split_batch_norm_backward`."""
    x = reference.dense(x)
    dy, cut = reference.like(dy, x), plan(x, len(mean), tiles)
    dx, found = torch.empty_like(x), _scratch(x, cut)
    dw, db = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    _sums[cut.grid](dy, x, mean, found, **cut.sizes, **cut.blocks, enable_fp_fusion=True)
    _gradient[cut.grid](
        dy, x, dx, found if weight is None else weight.contiguous(), mean, var, found, dw, db, eps,
        **cut.sizes, HAS_WEIGHT=weight is not None, **cut.blocks, CHUNK=SHARES, enable_fp_fusion=True,
    )  # fmt: skip
    return dx, dw, db


CANDIDATES = {
    "together": [(e, c, w, p) for e in (1024, 2048, 4096) for c in (64, 128) for w in (4, 8) for p in (4, 8)],
    "apart": [(e, c, w, p) for e in (1024, 2048, 4096) for c in (256, 1024) for w in (4, 8) for p in (4, 8)],
}


def tune_case(key: str) -> Callable[[tuple], Callable[[], object]]:
    """What bench/tune.py times: forward and backward of a first block of ResNet-50 in bf16."""
    x, dy = (torch.randn(256, 64, 56, 56, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if key == "together":
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    weight = torch.ones(64, device="cuda")

    def make(tiles: tuple[int, int, int, int]) -> Callable[[], object]:
        def run() -> None:
            _, mean, var = split_batch_norm(x, weight, weight, 8, 1e-5, tiles)
            split_batch_norm_backward(dy, x, weight, mean, var, 1e-5, tiles)

        return run

    return make
