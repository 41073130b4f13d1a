"""DINO's cross-entropy between teacher and student, loss and gradients, without the N x P logits of either.

With s^, t^ (N, C) the normalised rows, prototypes w of the student and v of the
teacher, (P, C) each, s_ip = s^_i.w_p / T_s and t_ip = (t^_i.v_p - center_p) / T_t::

    A_i = sum_p softmax(t_i)_p w_p,          B_i = sum_p softmax(s_i)_p w_p
    loss_i = logsumexp_p(s_ip) - A_i.s^_i / T_s
    ds^_i  = (B_i - A_i) / T_s
    dw_p   = sum_i (softmax(s_i)_p - softmax(t_i)_p) s^_i / T_s

A is attention of the teacher's rows with keys v and values w, B of the student's
with keys and values w, so the teacher's logits meet the student's nowhere: two
launches of ``sweep``, in which a program holds BLOCK_M rows and walks its share
of the prototypes under a running maximum, since the center and the norms of
prototypes bound nothing. ``finish`` adds the shares in a fixed order. dw, if
wanted, is a last launch: a program holds BLOCK_M prototypes and walks all rows,
whose maxima and sums are known by then. No atomics: results are bitwise repeatable.

8 N P C FLOP and 2 N P exponentials, 14 and 4 with dw. Memory: the prototypes are
rounded to operands once, 12 P C bytes from fp32 in 16 bit (nothing if they are
in the operand type), then read, 2 P C bytes, three times, once more each for dw.
Pairs of operands ("highest") of more than 256 features are left to the reference.

Kernels: dino_kernels.py.  Reference: moco_fast.reference.dino.  Tests: tests/test_dino_op.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels import dino_kernels
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
from moco_fast.kernels.operands import Operand, operand

# (BLOCK_M, BLOCK_N, warps, stages, programs per multiprocessor) by (what a program holds, padded C); "split"
# is precision "highest". tests/test_aot.py: no wgmma waits for another, and only the widest prototypes spill,
# of 512 features and split ones of 256, whatever the tiles. Not measured on a GPU yet.
TILES = {
    ("rows", 32): (64, 64, 4, 3, 3),
    ("rows", 64): (128, 64, 8, 3, 1),
    ("rows", 128): (128, 64, 8, 3, 1),
    ("rows", 256): (64, 64, 8, 2, 1),
    ("rows", 512): (64, 16, 8, 2, 1),
    ("prototypes", 32): (128, 64, 8, 3, 1),
    ("prototypes", 64): (128, 32, 8, 3, 2),
    ("prototypes", 128): (128, 32, 8, 3, 1),
    ("prototypes", 256): (128, 32, 8, 2, 1),
    ("prototypes", 512): (64, 16, 8, 2, 1),
    ("split rows", 32): (64, 64, 4, 3, 3),
    ("split rows", 64): (128, 64, 8, 2, 1),
    ("split rows", 128): (128, 32, 8, 3, 1),
    ("split rows", 256): (64, 16, 4, 2, 1),
    ("split prototypes", 32): (128, 64, 8, 3, 1),
    ("split prototypes", 64): (128, 32, 8, 3, 1),
    ("split prototypes", 128): (128, 32, 8, 2, 1),
    ("split prototypes", 256): (64, 16, 4, 2, 1),
}
# Before sm_90 the operands of every product pass through registers, and some GPUs have 99 KB for all tiles.
OLDER_TILES = {
    ("rows", 32): (128, 64, 8, 3, 1),
    ("rows", 64): (128, 64, 8, 3, 1),
    ("rows", 128): (128, 64, 8, 2, 1),
    ("rows", 256): (64, 32, 8, 2, 1),
    ("rows", 512): (32, 16, 8, 2, 1),
    ("prototypes", 64): (128, 32, 8, 3, 1),
    ("prototypes", 128): (64, 32, 8, 2, 1),
    ("prototypes", 256): (64, 16, 8, 2, 1),
    ("prototypes", 512): (16, 16, 8, 2, 1),
    ("split rows", 64): (128, 32, 8, 3, 1),
    ("split rows", 128): (64, 32, 8, 2, 1),
    ("split rows", 256): (32, 16, 8, 2, 1),
    ("split prototypes", 32): (128, 32, 8, 3, 1),
    ("split prototypes", 64): (64, 32, 8, 2, 1),
    ("split prototypes", 128): (32, 16, 8, 2, 1),
    ("split prototypes", 256): (16, 16, 8, 2, 1),
}

MAX_SPLIT_FEATURES = 256  # wider pairs of operands, of both models at once, no GPU's registers hold

# Exponentials and weights, up to 1 in magnitude, are operands too, scaled by a power of two so that fp16 does
# not lose the small ones.
OFFSET = {torch.float16: 15.0, torch.bfloat16: 0.0}


class Partial(NamedTuple):
    """What the programs of a sweep left behind, one part per share of the prototypes."""

    sums: Tensor  # (SHARES, N, C) fp32, or empty
    totals: Tensor  # (SHARES, N) fp32
    shifts: Tensor  # (SHARES, N) fp32


def tiles_for(kind: str, block_c: int, tma: bool) -> Tiles:
    """The entry of the tables for rows padded to block_c features."""
    return TILES[kind, block_c] if tma else (TILES | OLDER_TILES)[kind, block_c]


def sweep(
    x: Operand,  # N rows of a model
    y: Operand,  # its P prototypes
    features: int,  # C
    temperature: float,
    w: Operand,  # those of the student
    *,
    center: Tensor | None = None,  # (P,) fp32, for the teacher
    mean: bool = True,  # whether the sums of prototypes are wanted
    tiles: Tiles | None = None,
) -> Partial:
    """Attention of a model's rows, in parts; ``tiles`` in place of the tables' entry."""
    (rows, width), columns, device = x.high.shape, len(y.high), x.high.device
    split, tma, block_c = x.low is not x.high, has_tma(device), padded_features(features)
    kind = "split rows" if split else "rows"
    block_m, block_n, warps, stages, per_sm = tiles or tiles_for(kind, block_c, tma)
    blocks, steps = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    shares = shares_of(rows, features if mean else 1, blocks, steps, per_sm * multiprocessors(device))
    tiles_per_share = triton.cdiv(steps, shares)
    shares = triton.cdiv(steps, tiles_per_share)

    totals, shifts = torch.empty((2, shares, rows), device=device, dtype=torch.float32)
    sums = torch.empty((shares if mean else 0, rows, features), device=device, dtype=torch.float32)
    heights = (block_m, block_m, *[block_n] * 4)
    dino_kernels.sweep[(blocks, shares)](
        *row_blocks((*x, *y, *w), heights, block_c, tma),
        totals if center is None else center, sums, totals, shifts,
        rows, columns, features, tiles_per_share, LOG2E / temperature,
        WIDTH=width, TMA=tma, OFFSET=OFFSET[x.high.dtype], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        EVEN=columns % block_n == 0, SPLIT=split, TEACHER=center is not None, MEAN=mean,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return Partial(sums, totals, shifts)


def prototype_gradients(
    w: Operand,  # P prototypes of the student
    v: Operand,  # and of the teacher
    s: Operand,  # N rows of the student
    t: Operand,  # and of the teacher
    center: Tensor,  # (P,) fp32
    tops: Tensor,  # (2, N), see dino_kernels.finish()
    shares_of_one: Tensor,  # (2, N)
    features: int,  # C
    student_temperature: float,
    teacher_temperature: float,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """The gradient of the sum of all losses to w, (P, C) fp32; ``tiles`` in place of the tables' entry."""
    (count, width), rows, device = w.high.shape, len(s.high), w.high.device
    split, tma, block_c = w.low is not w.high, has_tma(device), padded_features(features)
    kind = "split prototypes" if split else "prototypes"
    block_m, block_n, warps, stages, _ = tiles or tiles_for(kind, block_c, tma)
    dw = torch.empty((count, features), device=device, dtype=torch.float32)
    dino_kernels.prototypes[(triton.cdiv(count, block_m),)](
        *row_blocks((*w, *v, *s, *t), [block_m] * 4 + [block_n] * 4, block_c, tma),
        center, tops, shares_of_one, dw,
        count, rows, features, LOG2E / student_temperature, LOG2E / teacher_temperature,
        2.0 ** -OFFSET[w.high.dtype] / student_temperature,
        WIDTH=width, TMA=tma, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, SPLIT=split,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dw


def dino(
    student: Tensor,  # (N, C) raw
    teacher: Tensor,  # (N, C) raw
    prototypes: Tensor,  # (P, C)
    teacher_prototypes: Tensor,  # (P, C)
    center: Tensor,  # (P,) fp32
    student_temperature: float,
    teacher_temperature: float,
    precision: str,
    need_ds: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.dino`."""
    if precision == "highest" and student.shape[1] > MAX_SPLIT_FEATURES:
        return reference.dino(
            student, teacher, prototypes, teacher_prototypes, center,
            student_temperature, teacher_temperature, precision, need_ds, need_dw,
        )  # fmt: skip
    student, center = student.contiguous(), center.contiguous()
    n, features = student.shape
    s, t = (operand(x[None], precision, unit=True) for x in (student, teacher))
    w, v = (operand(x[None], precision, unit=False) for x in (prototypes, teacher_prototypes))
    wanted = sweep(t, v, features, teacher_temperature, w, center=center)
    found = sweep(s, w, features, student_temperature, w, mean=need_ds)

    loss = torch.empty(n, device=student.device, dtype=torch.float32)
    tops, shares_of_one = torch.empty((2, 2, n), device=student.device, dtype=torch.float32)
    ds = torch.empty((n if need_ds else 0, features), device=student.device, dtype=torch.float32)
    block_c, shares = padded_features(features), [len(part.totals) for part in (wanted, found)]
    block_r, chunk, finishing_warps = finishing_blocks(n, block_c, student.device)
    dino_kernels.finish[(triton.cdiv(n, block_r),)](
        student, *wanted, *found, loss, tops, shares_of_one, ds,
        n, features, 1 / student_temperature, 2.0 ** OFFSET[s.high.dtype],
        T_SHARES=shares[0], S_SHARES=shares[1],
        BLOCK_T=triton.next_power_of_2(shares[0]), BLOCK_S=triton.next_power_of_2(shares[1]),
        BLOCK_R=block_r, CHUNK=chunk, BLOCK_C=block_c, GRADIENT=need_ds, num_warps=finishing_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if not need_dw:
        return loss, ds, torch.empty((0, features), device=student.device, dtype=torch.float32)
    temperatures = (student_temperature, teacher_temperature)
    return loss, ds, prototype_gradients(w, v, s, t, center, tops, shares_of_one, features, *temperatures)


def _candidates(kind: str, features: int) -> list[Tiles]:
    split, models = "split" in kind, 2 if "prototypes" in kind else 1  # whose blocks a program holds
    width = 2 * features * (2 if split else 1)  # bytes of a row
    return candidates(
        (64, 128),
        (16, 32, 64) if features >= 128 else (32, 64),
        (3, 4) if features == 32 else (2, 3),
        lambda block_m, block_n, stages: (models * block_m + 2 * stages * block_n) * width,
        sums=features,
        scores=models,
        more_warps=features >= 256 and not split,
    )


CANDIDATES = {key: _candidates(*key) for key in TILES}


def tune_case(
    key: tuple[str, int], rows: int = 512, prototypes: int = 65536, device: str = "cuda"
) -> Callable[[Tiles], Callable[[], object]]:
    """What bench/tune.py times: both sweeps, or the gradient to the prototypes, of a step with 512 rows."""
    kind, features = key
    precision = "highest" if "split" in kind else "high"
    s, t, w, v = (
        operand(torch.randn(1, count, features, device=device), precision, unit=True)
        for count in (rows, rows, prototypes, prototypes)
    )
    center = torch.zeros(prototypes, device=device)
    tops = torch.full((2, rows), LOG2E / 0.04, device=device)

    def make(tiles: Tiles) -> Callable[[], object]:
        if "prototypes" in kind:
            return lambda: prototype_gradients(
                w, v, s, t, center, tops, tops, features, 0.1, 0.04, tiles=tiles
            )
        return lambda: (
            sweep(t, v, features, 0.04, w, center=center, tiles=tiles),
            sweep(s, w, features, 0.1, w, tiles=tiles),
        )

    return make
