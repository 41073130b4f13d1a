"""The losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moco_fast.kernels import backend as triton
from moco_fast.kernels import info_nce_sweep as sweep
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES, FP32, stream


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, precision: str, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.info_nce`."""
    if q.is_cuda:
        sweep.check_queue(queue, precision)
        return triton.info_nce(q, k, queue, temperature, precision, need_dq, need_stats, by_hand=True)
    q, k, queue = q.contiguous(), k.contiguous(), queue.contiguous()
    n, features = q.shape
    # Options are spelled out: torch's default dtype and device are the user's to change.
    loss, pos, neg = (torch.empty(n, **FP32) for _ in range(3))
    rank = torch.empty(n, dtype=torch.int64, device="cpu")
    dq = torch.empty(n if need_dq else 0, features, **FP32)
    compiled._C.info_nce(
        q.data_ptr(), k.data_ptr(), DTYPES[q.dtype], queue.data_ptr(), DTYPES[queue.dtype],
        n, queue.shape[0], features, temperature,
        loss.data_ptr(), dq.data_ptr() if need_dq else 0, rank.data_ptr(), pos.data_ptr(), neg.data_ptr(),
        precision == "medium", torch.get_num_threads(),
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
