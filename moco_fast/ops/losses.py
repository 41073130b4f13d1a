"""The losses: gradients are computed in the forward pass, backward scales them."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from moco_fast import backends, checks, reference
from moco_fast.ops import arguments, library


class InfoNCEStats(NamedTuple):
    """What a training loop wants to know about the logits, without the logits.

    Attributes:
        rank: (N,) int64, how many negatives are more similar than the positive; accuracy@k is
            ``(rank < k).float().mean()``.
        pos: (N,) fp32, cosine of query and key.
        neg: (N,) fp32, mean cosine of query and queue.
    """

    rank: Tensor
    pos: Tensor
    neg: Tensor

    def means(self) -> dict[str, Tensor]:
        """Means over the queries, 0-d: "pos_sim", "neg_sim" and "acc1", the share whose key is closest."""
        acc1 = (self.rank == 0).to(self.pos.dtype).mean()
        return {"pos_sim": self.pos.mean(), "neg_sim": self.neg.mean(), "acc1": acc1}


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float = ...,
    *,
    precision: str = ...,
    reduction: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float = ...,
    *,
    precision: str = ...,
    reduction: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, InfoNCEStats]: ...


def info_nce(
    q: Tensor,  # (N, C)
    k: Tensor,  # (N, C)
    queue: Tensor,  # (K, C)
    temperature: float = 0.07,
    *,
    precision: str = "high",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of queries against their keys and a queue of negatives, fused.

    ``loss_i = -log( exp(q^_i.k^_i/T) / (exp(q^_i.k^_i/T) + sum_j exp(q^_i.n_j/T)) )``
    with ``x^ = x / max(|x|, 1e-12)``. Neither the N x K logits nor their
    gradient exist in memory. The gradient, to ``q`` only, is computed in the
    forward pass, so the queue may be overwritten before ``backward()``.
    Source: He et al. 2020, "Momentum Contrast", equation 1.

    Args:
        q: queries (N, C), not normalised; fp32, bf16, fp16 or float64.
        k: keys (N, C) of the same dtype, not normalised, without grad.
        queue: negatives (K, C) with rows of unit norm, any floating dtype; ``model.queue.t()`` for MoCo's
            buffer.
        temperature: T > 0.
        precision: what the matrix products may round their operands to at most:
            "highest" fp32, "high" fp16 (on a CPU fp32), "medium" bf16. Sums are always fp32.
        reduction: "mean", "sum" or "none" over the queries.
        return_stats: also return :class:`InfoNCEStats`, without gradient.

    Returns:
        The loss in fp32 (float64 for float64 inputs), a scalar, or (N,) for "none".
        A non-finite row gives a non-finite loss. It can be differentiated once; a second derivative raises.

    Raises:
        TypeError: not a floating-point tensor, or dtypes of q and k differ.
        ValueError: shapes or devices do not match, an empty batch or queue,
            a temperature that is not finite and positive, k or queue requires grad.

    Example:
        >>> loss = moco_fast.info_nce(q, k, queue, temperature=0.2)
    """
    q, k, queue = arguments.info_nce(q, k, queue)
    temperature = checks.temperature("temperature", temperature)
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    need_dq = q.requires_grad and torch.is_grad_enabled()
    rows, _, rank, pos, neg = _info_nce(q, k, queue, temperature, precision, need_dq, return_stats)
    loss = reduced(rows, reduction)
    return (loss, InfoNCEStats(rank, pos, neg)) if return_stats else loss


def nt_xent(
    z1: Tensor,  # (N, C)
    z2: Tensor,  # (N, C)
    temperature: float = 0.5,
    *,
    precision: str = "high",
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent, the loss of SimCLR: every view against all others of the batch, fused.

    ``loss_i = -log( exp(z^_i.z^_i'/T) / sum_{j != i} exp(z^_i.z^_j/T) )`` over the
    2N rows of ``z = cat([z1, z2])``, with i' the other view of i and
    ``z^ = z / max(|z|, 1e-12)``. Neither the 2N x 2N logits nor their gradient
    exist in memory. The gradient, to both views, is computed in the forward pass.
    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of
    Visual Representations", equation 1.

    Args:
        z1: one view of every image (N, C), not normalised; fp32, bf16, fp16 or float64.
        z2: the other view (N, C), of the same dtype.
        temperature: T > 0.
        precision: what the matrix products may round their operands to at most:
            "highest" fp32, "high" fp16 (on a CPU fp32), "medium" bf16. Sums are always fp32.
        reduction: "mean" or "sum" over the 2N views, or "none": (2N,) losses, without gradient.

    Returns:
        The loss in fp32 (float64 for float64 inputs), a scalar, or (2N,) for "none".
        A non-finite row gives non-finite losses. It can be differentiated once; a second derivative raises.

    Raises:
        TypeError: not a floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not match, an empty batch, a temperature that is not finite and
            positive, "none" where a gradient is wanted.

    Example:
        >>> loss = moco_fast.nt_xent(model(view1), model(view2), temperature=0.1)
    """
    z1, z2 = arguments.nt_xent(z1, z2)
    temperature = checks.temperature("temperature", temperature)
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    need_dz = (z1.requires_grad or z2.requires_grad) and torch.is_grad_enabled()
    checks.one_gradient(reduction, need_dz)
    rows, _ = _nt_xent(torch.cat([z1, z2]), temperature, precision, need_dz)
    return reduced(rows, reduction)


def contrast(
    q: Tensor,  # (N, C) or (D, N, C)
    k: Tensor,  # (M, C) or (D, M, C), M >= N
    temperature: float = 1.0,
    *,
    first: int = 0,
    precision: str = "high",
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of queries against the keys of a batch, fused.

    ``loss_i = -log( exp(q^_i.k^_y/T) / sum_j exp(q^_i.k^_j/T) )`` with
    ``y = first + i`` and ``x^ = x / max(|x|, 1e-12)``: ``F.cross_entropy(q^ @ k^.T / T,
    arange(N) + first)``, the loss of MoCo v3 without its factor 2T. Neither the
    N x M logits nor their gradient exist in memory. Gradients are computed in the
    forward pass: to ``q``, and to ``k`` unless it is frozen, that is, without grad.
    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised
    Vision Transformers", algorithm 1; end-to-end, with gradient to the keys: He et
    al. 2020, "Momentum Contrast", figure 2a.

    Args:
        q: queries (N, C), not normalised; fp32, bf16, fp16 or float64. Or (D, N, C): D problems that share
            launches, such as the two directions of a symmetric loss.
        k: keys (M, C), or (D, M, C), M >= N, of the same dtype, not normalised; on several ranks those of
            all, in the order of the ranks.
        temperature: T > 0.
        first: row of k that is the key of the first query, N * rank for gathered keys.
        precision: what the matrix products may round their operands to at most:
            "highest" fp32, "high" fp16 (on a CPU fp32), "medium" bf16. Sums are always fp32.
        reduction: "mean" or "sum" over all D N queries, or "none": losses (N,) or (D, N), without a gradient
            to k.

    Returns:
        The loss in fp32 (float64 for float64 inputs), a scalar, or one per query for "none".
        A non-finite row gives non-finite losses. It can be differentiated once; a second derivative raises.

    Raises:
        TypeError: not a floating-point tensor, dtypes differ, first is not an integer.
        ValueError: shapes or devices do not match, an empty batch, first out of range, a temperature that is
            not finite and positive, "none" where a gradient to k is wanted.

    Example:
        >>> loss = 4 * T * moco_fast.contrast(torch.stack([q1, q2]), torch.stack([k2, k1]), T)  # MoCo v3
    """
    q, k, first = arguments.contrast(q, k, first)
    temperature = checks.temperature("temperature", temperature)
    checks.one_of("precision", precision, checks.PRECISIONS)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)

    need_dq, need_dk = (x.requires_grad and torch.is_grad_enabled() for x in (q, k))
    checks.one_gradient(reduction, need_dk)
    problems, shape = (q, k) if q.ndim == 3 else (q[None], k[None]), q.shape[:-1]
    rows, _, _ = _contrast(*problems, temperature, first, precision, need_dq, need_dk)
    return reduced(rows.view(shape), reduction)


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """The losses of all rows, or their mean or sum."""
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient found in the forward pass, for losses that arrive at autograd with ``scale``.

    In place where nobody reads it again: that to the prototypes of :func:`moco_fast.dino` is large.
    """
    if gradient.dtype == dtype and library.is_read_once(gradient):
        return gradient.mul_(scale)
    return (scale * gradient).to(dtype)


def _save_dq(ctx, arguments, results):
    ctx.save_for_backward(arguments[0], results[1])


def _scale_dq(ctx, saved, of_loss):
    q, dq = saved
    return scaled(dq, of_loss[:, None], q.dtype), None, None, None, None, None, None


@library.op("info_nce", save=_save_dq, gradients=_scale_dq)
def _info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, precision: str, need_dq: bool, need_stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend = backends.choose("info_nce", (q, k, queue))
    with library.without_autocast(q.device):
        return backend.info_nce(q, k, queue, temperature, precision, need_dq, need_stats)


@library.fake(_info_nce)
def _(q, k, queue, temperature, precision, need_dq, need_stats):
    n, c = q.shape
    loss = q.new_empty((n,), dtype=reference.compute_dtype(q, k, queue))
    dq = loss.new_empty((n if need_dq else 0, c))
    stats = n if need_stats else 0
    return loss, dq, q.new_empty((stats,), dtype=torch.int64), loss.new_empty(stats), loss.new_empty(stats)


def _scale_dz(ctx, saved, of_loss):
    z, dz = saved
    # dz is that of the sum of the losses: only their mean or sum leaves nt_xent() with a gradient, so that
    # all of of_loss is one value.
    return scaled(dz, of_loss[:1, None], z.dtype), None, None, None


@library.op("nt_xent", save=_save_dq, gradients=_scale_dz)
def _nt_xent(z: Tensor, temperature: float, precision: str, need_dz: bool) -> tuple[Tensor, Tensor]:
    backend = backends.choose("nt_xent", (z,))
    with library.without_autocast(z.device):
        return backend.nt_xent(z, temperature, precision, need_dz)


@library.fake(_nt_xent)
def _(z, temperature, precision, need_dz):
    loss = z.new_empty(z.shape[:1], dtype=reference.compute_dtype(z))
    return loss, loss.new_empty((z.shape[0] if need_dz else 0, z.shape[1]))


def _save_both(ctx, arguments, results):
    ctx.save_for_backward(*arguments[:2], *results[1:])


def _scale_both(ctx, saved, of_loss):
    q, k, dq, dk = saved
    dq = scaled(dq, of_loss[..., None], q.dtype) if ctx.needs_input_grad[0] else None
    # As dz of nt_xent: where k wants a gradient, all of of_loss is one value.
    dk = scaled(dk, of_loss[:1, :1, None], k.dtype) if ctx.needs_input_grad[1] else None
    return dq, dk, None, None, None, None, None


@library.op("contrast", save=_save_both, gradients=_scale_both)
def _contrast(
    q: Tensor, k: Tensor, temperature: float, first: int, precision: str, need_dq: bool, need_dk: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backends.choose("contrast", (q, k))
    with library.without_autocast(q.device):
        return backend.contrast(q, k, temperature, first, precision, need_dq, need_dk)


@library.fake(_contrast)
def _(q, k, temperature, first, precision, need_dq, need_dk):
    problems, rows, features = q.shape
    loss = q.new_empty((problems, rows), dtype=reference.compute_dtype(q, k))
    dq = loss.new_empty((problems, rows if need_dq else 0, features))
    return loss, dq, loss.new_empty((problems, k.shape[1] if need_dk else 0, features))
