"""DINO's loss: gradients are computed in the forward pass, backward scales them."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast import backends, checks, reference
from moco_fast.ops import arguments, library
from moco_fast.ops.losses import reduced, scaled


def dino(
    student: Tensor,  # (N, C)
    teacher: Tensor,  # (N, C)
    prototypes: Tensor,  # (P, C)
    teacher_prototypes: Tensor,  # (P, C)
    center: Tensor,  # (P,)
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    *,
    precision: str = "high",
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy between DINO's centred, sharpened teacher and its student, fused.

    ``loss_i = -sum_p softmax((v.t^_i - center) / T_t)_p log_softmax(w.s^_i / T_s)_p``
    with rows w_p of ``prototypes``, v_p of ``teacher_prototypes`` and
    ``x^ = x / max(|x|, 1e-12)``. Neither the N x P logits of a model nor their gradient
    exist in memory. Gradients, to ``student`` and, unless they are frozen, to
    ``prototypes``, are computed in the forward pass.
    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
    Transformers", equation 2 and algorithm 1.

    The mean teacher logits, towards which algorithm 1 moves the center, need no logits
    either: ``teacher_prototypes @ F.normalize(teacher, dim=1).mean(0)``.

    Args:
        student: features (N, C) of the student before its last layer, not normalised; fp32, bf16, fp16 or
            float64.
        teacher: those (N, C) of the teacher, for another view of the same images; same dtype, no grad.
        prototypes: weight (P, C) of the student's last layer, any floating dtype; used as it is, so weight
            normalisation, if any, comes before.
        teacher_prototypes: the teacher's (P, C), without grad.
        center: (P,), what is subtracted from the teacher's logits, fp32 (or float64).
        student_temperature: T_s > 0.
        teacher_temperature: T_t > 0.
        precision: what the matrix products may round their operands to at most:
            "highest" fp32, "high" fp16 (on a CPU fp32), "medium" bf16. Sums are always fp32.
        reduction: "mean" or "sum" over the rows, or "none": (N,) losses, without a gradient to prototypes.

    Returns:
        The loss in fp32 (float64 if a tensor is float64), a scalar, or (N,) for "none".
        A non-finite row of student or teacher gives that row a non-finite loss, a non-finite student's
        prototype all rows, as does a teacher's unless its logit is -inf: such a prototype has no weight.
        It can be differentiated once; a second derivative raises.

    Raises:
        TypeError: not a floating-point tensor, dtypes of student and teacher differ, center of 16 bits.
        ValueError: shapes or devices do not match, no rows, features or prototypes, a temperature that is
            not finite and positive, teacher, teacher_prototypes or center requires grad, "none" where a
            gradient to prototypes is wanted.

    Example:
        >>> loss = moco_fast.dino(head(student(x1)), teacher_head(teacher(x2)), w, teacher_w, center)
    """
    tensors = arguments.dino(student, teacher, prototypes, teacher_prototypes, center)
    temperatures = (
        checks.temperature("student_temperature", student_temperature),
        checks.temperature("teacher_temperature", teacher_temperature),
    )
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    need_ds, need_dw = (x.requires_grad and torch.is_grad_enabled() for x in (tensors[0], tensors[2]))
    checks.one_gradient(reduction, need_dw)
    rows, _, _ = _dino(*tensors, *temperatures, precision, need_ds, need_dw)
    return reduced(rows, reduction)


def _save(ctx, arguments, results):
    ctx.save_for_backward(arguments[0], arguments[2], *results[1:])


def _scale(ctx, saved, of_loss):
    student, prototypes, ds, dw = saved
    ds = scaled(ds, of_loss[:, None], student.dtype) if ctx.needs_input_grad[0] else None
    # dw is that of the sum of the losses: where prototypes want a gradient, only their mean or sum leaves
    # dino(), so that all of of_loss is one value.
    dw = scaled(dw, of_loss[:1, None], prototypes.dtype) if ctx.needs_input_grad[2] else None
    return ds, None, dw, *[None] * 7


@library.op("dino", save=_save, gradients=_scale)
def _dino(
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
    tensors = (student, teacher, prototypes, teacher_prototypes, center)
    backend = backends.choose("dino", tensors)
    with library.without_autocast(student.device):
        return backend.dino(*tensors, student_temperature, teacher_temperature, precision, need_ds, need_dw)


@library.fake(_dino)
def _(student, teacher, prototypes, teacher_prototypes, center, t_s, t_t, precision, need_ds, need_dw):
    dtype = reference.compute_dtype(student, teacher, prototypes, teacher_prototypes, center)
    (n, c), p = student.shape, prototypes.shape[0]
    loss = student.new_empty((n,), dtype=dtype)
    return loss, loss.new_empty((n if need_ds else 0, c)), loss.new_empty((p if need_dw else 0, c))
