"""DINO's cross-entropy between teacher and student, block by block over the prototypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moco_fast.reference.common import compute_dtype, normalise
from moco_fast.reference.losses import through_norm

BLOCK_LOGITS = 2**18  # of a model, that exist at a time: 1 MB in fp32, and never fewer than 64 prototypes


def dino(
    student: Tensor,  # (N, C), raw
    teacher: Tensor,  # (N, C), raw
    prototypes: Tensor,  # (P, C)
    teacher_prototypes: Tensor,  # (P, C)
    center: Tensor,  # (P,)
    student_temperature: float,
    teacher_temperature: float,
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_ds: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every student row to its teacher row and its gradients, in one forward.

    With prototypes w_p of the student and v_p of the teacher, ``s_ip = s^_i.w_p / T_s``,
    ``t_ip = (t^_i.v_p - center_p) / T_t``, p^s_i = softmax(s_i) and p^t_i = softmax(t_i)::

        loss_i = logsumexp_p(s_ip) - sum_p p^t_ip s_ip
        ds^_i  = sum_p (p^s_ip - p^t_ip) w_p / T_s,     ds_i = (ds^_i - s^_i (s^_i.ds^_i)) / |s_i|
        dw_p   = sum_i (p^s_ip - p^t_ip) s^_i / T_s

    A first sweep over the prototypes finds the log-sum-exps and the loss; a second, if a gradient is
    wanted, computes the logits again. N x P of them never exist.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
    Transformers", equation 2 and algorithm 1.

    Returns:
        loss (N,), ds (N, C) or (0, C): of each row's loss, dw (P, C) or (0, C): of the sum of the losses.
    """
    dtype = compute_dtype(student, teacher, prototypes, teacher_prototypes, center)
    s_hat, norm = normalise(student.to(dtype))
    t_hat, _ = normalise(teacher.to(dtype))
    size = max(64, BLOCK_LOGITS // len(student))

    def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Prototypes (B, C), and logits of student and teacher (N, B) to them."""
        parts = (x.split(size) for x in (prototypes, teacher_prototypes, center))
        for w, v, c in zip(*parts, strict=True):
            w = w.to(dtype)
            s = (s_hat @ w.t()).div_(student_temperature)
            t = (t_hat @ v.to(dtype).t()).sub_(c.to(dtype)).div_(teacher_temperature)
            yield w, s, t

    found = []
    for _, s, t in blocks():
        # No -inf, which would meet itself where a block is masked, by a center of infinity say.
        top_s, top_t = (x.amax(dim=1).clamp_min(torch.finfo(dtype).min) for x in (s, t))
        e = t.sub_(top_t[:, None]).exp_()
        cross = (e * s.sub_(top_s[:, None])).sum(dim=1)  # what all scores have in common costs it no digits
        total_s = s.exp_().sum(dim=1)
        found.append(torch.stack([top_s, total_s, top_t, e.sum(dim=1), cross]))
    # Not through log-sum-exps: rounded at the size of 1 / T_t they would leave weights that do not sum to 1.
    tops_s, totals_s, tops_t, totals_t, crosses = torch.stack(found, dim=1)  # each (blocks, N)
    top_s, top_t = tops_s.amax(dim=0), tops_t.amax(dim=0)
    total_s = (totals_s * torch.exp(tops_s - top_s)).sum(dim=0)
    lift_t = torch.exp(tops_t - top_t)
    total_t = (totals_t * lift_t).sum(dim=0)
    crosses = crosses + totals_t * (tops_s - top_s)
    loss = total_s.log() - (crosses * lift_t).sum(dim=0) / total_t

    ds = loss.new_empty((0, student.shape[1]))
    dw = loss.new_empty((len(prototypes) if need_dw else 0, student.shape[1]))
    if not need_ds and not need_dw:
        return loss, ds, dw
    share_s, share_t = (1 / (student_temperature * total[:, None]) for total in (total_s, total_t))
    ds_hat = torch.zeros_like(s_hat)
    for i, (w, s, t) in enumerate(blocks()):
        t.sub_(top_t[:, None]).exp_().mul_(share_t)
        misses = s.sub_(top_s[:, None]).exp_().mul_(share_s).sub_(t)  # (p^s - p^t) / T_s
        if need_ds:
            ds_hat.addmm_(misses, w)
        if need_dw:
            torch.mm(misses.t(), s_hat, out=dw[i * size : i * size + len(w)])
    if need_ds:
        ds = through_norm(ds_hat, s_hat, norm)
    return loss, ds, dw
