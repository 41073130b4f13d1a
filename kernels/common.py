"""What every kernel file needs: how Triton runs here, and the sizes its grids follow from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# TRITON_INTERPRET=1 runs kernels on the CPU, in NumPy. It has to be set before a kernel file is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret

# The interpreter multiplies matrices of bf16 wrongly (Triton 3.5 to 3.9) and those of fp16 slowly: there they
# are widened first; products of 16-bit values are exact in fp32.
WIDEN = tl.constexpr(INTERPRETED)

EPS = tl.constexpr(1e-12)  # smallest norm a row is divided by, as in torch.nn.functional.normalize
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)

SCRATCH_BYTES = 16_800_000  # of partial sums, if one share of them takes less


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter, whose programs run one by one."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_tma(device: torch.device) -> bool:
    """Whether blocks are loaded through descriptors: by Hopper's copy engine, or the interpreter.

    Older GPUs get pointers: Triton turns a descriptor into loads of 2 bytes there, which products wait for.
    So do those from 12.0 on, which have the engine, but Ampere's products and shared memory.
    """
    return device.type != "cuda" or (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


@triton.jit
def row_norms(
    x,  # (R, C) fp32, zero where masked
):
    """Euclidean norm of every row, (R, 1), without overflow of the squares; rounded as IEEE 754 has it."""
    top = tl.max(tl.abs(x), axis=1, keep_dims=True)
    scale = tl.where((top > 0) & (top < float("inf")), top, 1.0)
    x = tl.div_rn(x, scale)
    return scale * tl.sqrt_rn(tl.sum(x * x, axis=1, keep_dims=True))


@triton.jit
def widened(x):
    """An operand of ``tl.dot`` as the hardware, or the interpreter, multiplies it correctly."""
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def exp2_scaled(
    s,  # (M, N) fp32
    scale,
    shift,  # broadcasts to s
):
    """``exp2(s * scale - shift)``, one fused multiply-add each whatever the compiler's default."""
    return tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, tl.zeros_like(s) - shift))


@triton.jit
def unit_rows(
    x,  # (R, C) fp32
    norm,  # (R, 1)
):
    """``x / max(norm, EPS)``, rounded as IEEE 754 has it: a GPU's own division is off by up to 2 ulp."""
    return tl.div_rn(x, tl.where(norm < EPS, EPS, norm))  # not maximum(): a NaN must stay


@triton.jit
def through_norm(
    d_hat, x_hat,  # (R, C) fp32
    norm,  # (R, 1)
):  # fmt: skip
    """The gradient to rows, from the one to their normalised selves."""
    # A norm below EPS was clamped to a constant, through which no gradient flows.
    radial = tl.where(norm < EPS, 0.0, tl.sum(x_hat * d_hat, axis=1, keep_dims=True))
    return unit_rows(d_hat - radial * x_hat, norm)


@triton.jit
def load_rows(
    source,  # (ROWS, WIDTH): a descriptor of blocks (BLOCK_R, BLOCK_C) if TMA, else a pointer
    first, ROWS,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``first + BLOCK_R``, zero beyond the last row and the last column."""
    if TMA:
        rows = source.load([first, 0])
    else:
        row = tl.arange(0, BLOCK_R)[:, None]
        col = tl.arange(0, BLOCK_C)[None, :]
        start = source + first * tl.full([], WIDTH, tl.int64)
        rows = tl.load(start + (row * WIDTH + col), mask=(row < ROWS - first) & (col < WIDTH), other=0)
    return rows


@triton.jit
def store_operand(high, low, at, x, mask, SPLIT: tl.constexpr):
    """Write fp32 values in the operand type and, if SPLIT, what the rounding left of them."""
    rounded = x.to(high.dtype.element_ty)
    tl.store(high + at, rounded, mask=mask)
    if SPLIT:
        tl.store(low + at, (x - rounded.to(tl.float32)).to(high.dtype.element_ty), mask=mask)


@triton.jit
def product(
    a, a_low,  # (M, X)
    b, b_low,  # (X, Y)
    acc,  # (M, Y) fp32
    A_SPLIT: tl.constexpr, B_SPLIT: tl.constexpr,
):  # fmt: skip
    """``acc + (a + a_low) @ (b + b_low)`` without the product of the two low parts.

    The small products first: tensor cores truncate what they add, by up to an ulp of what is there already.
    """
    if A_SPLIT:
        acc = tl.dot(widened(a_low), widened(b), acc, input_precision="ieee")
    if B_SPLIT:
        acc = tl.dot(widened(a), widened(b_low), acc, input_precision="ieee")
    return tl.dot(widened(a), widened(b), acc, input_precision="ieee")


@triton.jit
def add_product(
    acc,  # (M, Y) fp32
    p,  # (M, X) fp32, rounded to the type of b
    b, b_low,  # (X, Y)
    P_SPLIT: tl.constexpr, B_SPLIT: tl.constexpr,
):  # fmt: skip
    """``acc + p @ (b + b_low)``; of split operands summed apart and then added, where registers hold both.

    Additions round, tensor cores truncate: over the tiles of a share that would add up.
    """
    high = p.to(b.dtype)
    low = (p - high.to(tl.float32)).to(b.dtype) if P_SPLIT else high
    APART: tl.constexpr = P_SPLIT and acc.shape[1] <= 128
    total = product(high, low, b, b_low, tl.zeros_like(acc) if APART else acc, P_SPLIT, B_SPLIT)
    return acc + total if APART else total


@triton.jit
def cross_entropy(
    negatives,  # sum of their exponentials, less ``top``
    s0,  # logit of the positive, in base 2
    top,  # the shift
):
    """``-log(e / (negatives + e))`` with ``e = exp2(s0 - top)``, and ``negatives + e``."""
    e = tl.exp2(s0 - top)
    both = negatives + e
    # Where the positive dominates the loss is log(1 + ratio), with the digits that 1 + ratio would lose.
    ratio = negatives / e
    one = 1 + ratio
    log1p = tl.where(one == 1, ratio, tl.log2(one) * LN2 * (ratio / tl.where(one == 1, 1.0, one - 1)))
    loss = tl.where(ratio <= 1, log1p, (tl.log2(both) + (top - s0)) * LN2)
    return loss + 0 * (negatives + s0), both


@triton.jit
def add_shares(
    sums,  # (SHARES, N, C) fp32
    shifts, top,  # (SHARES, N), (R,) fp32: the shifts of the shares and of the result, if SHIFTED
    row,  # (R,) int64
    inside,  # (R, BLOCK_C)
    N, C,
    SHARES: tl.constexpr, CHUNK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Rows of the sum over the shares, CHUNK at a time, in a fixed order."""
    col = tl.arange(0, inside.shape[1])[None, None, :]
    result = tl.zeros(inside.shape, tl.float32)
    for start in range(0, SHARES, CHUNK):
        share = start + tl.arange(0, CHUNK)[None, :]
        at = share.to(tl.int64) * N + row[:, None]
        mask = (share < SHARES)[:, :, None] & inside[:, None, :]
        tile = tl.load(sums + at[:, :, None] * C + col, mask=mask, other=0)
        if SHIFTED:
            valid = (share < SHARES) & (row < N)[:, None]
            shift = tl.load(shifts + at, mask=valid, other=float("-inf"))
            tile *= tl.exp2(shift - top[:, None])[:, :, None]
        result += tl.sum(tile, axis=1)
    return result


def row_blocks(
    rows: Sequence[Tensor],  # (ROWS, WIDTH), contiguous
    heights: Sequence[int],  # of the blocks that a kernel loads
    block_c: int,
    tma: bool,
) -> list:
    """What ``load_rows`` takes."""
    if not tma:
        return list(rows)
    return [
        TensorDescriptor.from_tensor(r, [height, block_c]) for r, height in zip(rows, heights, strict=True)
    ]


def finishing_blocks(rows: int, block_c: int, device: torch.device) -> tuple[int, int, int]:
    """Rows, shares of them at a time, and warps of a program that adds shares.

    Few enough rows to fill the GPU and, at most 1024 values, not to spill. Where there is less than a row for
    every program that would run at a time, the time is that of one program: more loads at a time.
    """
    enough = rows // (4 * multiprocessors(device))
    if enough == 0:
        return 1, max(1, 16384 // block_c), 16
    block_r = min(1 << (enough.bit_length() - 1), max(1, 1024 // block_c))
    return block_r, max(1, 4096 // (block_c * block_r)), 4


def shares_of(
    rows: int,
    features: int,
    blocks: int,
    tiles: int,
    programs: int,
    scratch: int = SCRATCH_BYTES,
) -> int:
    """How many programs divide the columns of a block of rows among them.

    As many as run at a time, of which none waits for a second turn, within ``scratch`` bytes of partial sums.
    """
    affordable = scratch // (4 * rows * features)
    return max(1, min(programs // blocks, affordable, tiles))


def operand_dtype(precision: str) -> torch.dtype:
    """What the matrix products read; for "highest" in pairs, a value and what rounding took from it."""
    return torch.bfloat16 if precision == "medium" else torch.float16


def padded_features(features: int) -> int:
    """Columns of the blocks that hold rows of so many features."""
    return max(32, triton.next_power_of_2(features))
