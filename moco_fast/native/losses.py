"""The losses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels import backend as triton
from moco_fast.kernels import info_nce_sweep as sweep
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES, FP32, stream

# Queue rows per tile of the bf16 path: 2 MB of similarities at N = 256, and products large enough for oneDNN.
BF16_TILE = 2048
_bf16_lock = threading.Lock()


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, precision: str, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.info_nce`."""
    if q.is_cuda:
        sweep.check_queue(queue, precision)
        return triton.info_nce(q, k, queue, temperature, precision, need_dq, need_stats, by_hand=True)
    q, k, queue = q.contiguous(), k.contiguous(), queue.contiguous()
    if precision == "medium" and compiled.has_bf16_units():
        return _info_nce_bf16(q, k, queue, temperature, need_dq, need_stats)
    n, features = q.shape
    # Options are spelled out: torch's default dtype and device are the user's to change.
    loss, pos, neg = (torch.empty(n, **FP32) for _ in range(3))
    rank = torch.empty(n, dtype=torch.int64, device="cpu")
    dq = torch.empty(n if need_dq else 0, features, **FP32)
    compiled._C.info_nce(
        q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], queue.data_ptr(), DTYPES[queue.dtype],
        n, queue.shape[0], features, temperature,
        loss.data_ptr(), dq.data_ptr() if need_dq else 0, rank.data_ptr(), pos.data_ptr(), neg.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    stats = slice(None if need_stats else 0)
    return loss, dq, rank[stats], pos[stats], neg[stats]


def info_nce_sweep(
    q: Tensor,  # (N, C) raw
    k: Tensor,  # (N, C) raw, of the same dtype
    queue: Tensor,  # (K, C) fp16 or bf16
    pairs: Sequence[Tensor],  # |q|, |k| and their cosine, (N,)
    found: Sequence[Tensor],  # sums (SHARES, N, C), totals, shifts, and if wanted cosines, ranks (SHARES, N)
    steps: int,  # tiles per share
    numbers: tuple[float, float, float, float],  # scale, fixed shift, offset, least mean of its exponentials
    online: bool,
) -> None:
    """Queue the kernel of csrc/info_nce_sweep.h, which writes ``pairs`` and ``found``."""
    about, written = ([tensor.data_ptr() for tensor in group] for group in (pairs, found))
    compiled._C.info_nce_sweep(
        (q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], queue.data_ptr(), DTYPES[queue.dtype]),
        tuple(about), (*written, 0, 0)[:5],
        (len(q), *queue.shape, len(found[0]), steps), numbers, online, q.device.index, stream(q.device),
    )  # fmt: skip


def _info_nce_bf16(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same tile by tile, with the products in torch's GEMM, whose bf16 kernels use the matrix units.

    Operands are rounded to bf16 inside the GEMM; sums and everything else stay fp32.
    """
    q_hat, norm = reference.normalise(q.float())
    k_hat, _ = reference.normalise(k.float())
    n, features = q.shape
    negatives, threads = queue.shape[0], torch.get_num_threads()
    pos = (q_hat * k_hat).sum(dim=1)
    top = pos.clone()
    total, cosine_sum, loss, neg = (torch.zeros(n, **FP32) for _ in range(4))
    rank = torch.zeros(n, dtype=torch.int64, device="cpu")
    weighted = torch.zeros(n if need_dq else 0, features, **FP32)
    dq = torch.empty_like(weighted)
    weighted_ptr, dq_ptr = (weighted.data_ptr(), dq.data_ptr()) if need_dq else (0, 0)

    with _gemm_in_bf16():
        for rows in queue.split(BF16_TILE):
            rows = rows.float()
            tile = q_hat @ rows.t()
            compiled._C.info_nce_tile(
                tile.data_ptr(), n, rows.shape[0], features, temperature, pos.data_ptr(), top.data_ptr(),
                total.data_ptr(), cosine_sum.data_ptr(), rank.data_ptr(), weighted_ptr, threads,
            )  # fmt: skip
            if need_dq:
                weighted.addmm_(tile, rows)
    compiled._C.info_nce_finish(
        top.data_ptr(), total.data_ptr(), cosine_sum.data_ptr(), pos.data_ptr(), weighted_ptr,
        q_hat.data_ptr(), k_hat.data_ptr(), norm.data_ptr(), n, negatives, features, temperature,
        loss.data_ptr(), dq_ptr, neg.data_ptr(), threads,
    )  # fmt: skip
    stats = slice(None if need_stats else 0)
    return loss, dq, rank[stats], pos[stats], neg[stats]


@contextmanager
def _gemm_in_bf16() -> Iterator[None]:
    """Let oneDNN round the operands of fp32 matrix products to bf16, where the CPU has units for it.

    The setting is the process's: calls from several threads wait for each other, so that each restores
    what it found.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _bf16_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


def contrast(
    q: Tensor, k: Tensor, temperature: float, first: int, precision: str, need_dq: bool, need_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.contrast`."""
    q, k = q.contiguous(), k.contiguous()
    problems, queries, features = q.shape
    keys = k.shape[1]
    loss = torch.empty(problems, queries, **FP32)
    dq = torch.empty(problems, queries if need_dq else 0, features, **FP32)
    dk = torch.empty(problems, keys if need_dk else 0, features, **FP32)
    compiled._C.contrast(
        q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], problems, queries, keys, features, first, temperature,
        loss.data_ptr(), dq.data_ptr() if need_dq else 0, dk.data_ptr() if need_dk else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, dq, dk


def nt_xent(z: Tensor, temperature: float, precision: str, need_dz: bool) -> tuple[Tensor, Tensor]:
    """See :func:`moco_fast.reference.nt_xent`."""
    z = z.contiguous()
    rows, features = z.shape
    loss = torch.empty(rows, **FP32)
    dz = torch.empty(rows if need_dz else 0, features, **FP32)
    compiled._C.nt_xent(
        z.data_ptr(), DTYPES[z.dtype], rows, features, temperature,
        loss.data_ptr(), dz.data_ptr() if need_dz else 0, torch.get_num_threads(),
    )  # fmt: skip
    return loss, dz


def dino(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    precision: str,
    need_ds: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.dino`."""
    student, teacher, center = student.contiguous(), teacher.contiguous(), center.contiguous()
    prototypes, teacher_prototypes = prototypes.contiguous(), teacher_prototypes.contiguous()
    sizes = (rows, count, features) = len(student), *prototypes.shape
    loss = torch.empty(rows, **FP32)
    ds = torch.empty(rows if need_ds else 0, features, **FP32)
    dw = torch.empty(count if need_dw else 0, features, **FP32)
    compiled._C.dino(
        (student.data_ptr(), teacher.data_ptr(), DTYPES[student.dtype]),
        *((w.data_ptr(), DTYPES[w.dtype]) for w in (prototypes, teacher_prototypes)),
        center.data_ptr(), sizes, (student_temperature, teacher_temperature),
        (loss.data_ptr(), ds.data_ptr() if need_ds else 0, dw.data_ptr() if need_dw else 0),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, ds, dw
