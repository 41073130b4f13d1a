"""The losses, each with its gradient, in one forward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moco_fast.reference.common import EPS, compute_dtype, normalise

BLOCK = 2**22  # elements of the logits in memory at a time; 16 MB in fp32


def row_blocks(
    rows: int,
    width: int,  # elements that one row takes
) -> Iterator[slice]:
    """All rows in order, cut where their elements would pass ``BLOCK``."""
    each = max(1, BLOCK // width)
    return (slice(start, min(start + each, rows)) for start in range(0, rows, each))


def through_norm(
    d_hat: Tensor,  # (..., C) gradient to x_hat
    x_hat: Tensor,  # (..., C)
    norm: Tensor,  # (..., 1)
) -> Tensor:
    """The gradient to the rows whose normalised selves are ``x_hat``."""
    radial = (x_hat * d_hat).sum(dim=-1, keepdim=True)
    # A norm below EPS was clamped to a constant, through which no gradient flows.
    return (d_hat - torch.where(norm >= EPS, radial * x_hat, 0)) / norm.clamp_min(EPS)


def _cross_entropy(
    positive: Tensor,  # (...) logit of the positive
    negatives: Tensor,  # (..., K) logits of the negatives, -inf for none; overwritten
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (...), exps (..., K) and total (...), whose ratio is p of the negatives, and 1 - p_0 (...)."""
    top = torch.maximum(negatives.amax(dim=-1), positive)
    exps = negatives.sub_(top[..., None]).exp_()
    rest, e = exps.sum(dim=-1), torch.exp(positive - top)
    # log1p keeps the digits of a loss near zero, where the positive dominates.
    loss = torch.where(e == 1, torch.log1p(rest), torch.log(rest + e) + top - positive)
    return loss, exps, rest + e, rest / (rest + e)


@torch.no_grad()
def info_nce(
    q: Tensor,  # (N, C), raw
    k: Tensor,  # (N, C), raw
    queue: Tensor,  # (K, C), rows of unit norm
    temperature: float,
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dq: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE of each query and its gradient, in one forward.

    With ``s_0 = q^.k^ / T`` and ``s_j = q^.n_j / T``::

        loss = logsumexp(s_0, ..., s_K) - s_0
        dq^  = (sum_j p_j n_j - (1 - p_0) k^) / T,   p = softmax(s)
        dq   = (dq^ - q^ (q^.dq^)) / |q|

    Source: He et al. 2020, "Momentum Contrast", equation 1.

    Returns:
        loss (N,), dq (N, C) or (0, C), and (0,) each unless ``need_stats``: rank (N,) int64 = negatives
        above the positive, pos (N,) = q^.k^, neg (N,) = mean of q^.n_j.
    """
    dtype = compute_dtype(q, k, queue)
    q_hat, norm = normalise(q.to(dtype))
    k_hat, _ = normalise(k.to(dtype))
    rows = queue.to(dtype)

    pos = (q_hat * k_hat).sum(dim=1)
    loss, neg, dq_hat = torch.empty_like(pos), torch.empty_like(pos), torch.empty_like(q_hat)
    rank = pos.new_empty(len(q), dtype=torch.int64)
    for block in row_blocks(len(q), len(queue)):
        similarities = q_hat[block] @ rows.t()  # (queries of the block, K)
        neg[block] = similarities.mean(dim=1)
        if need_stats:
            rank[block] = (similarities > pos[block, None]).sum(dim=1)
        logits = similarities.div_(temperature)
        loss[block], exps, total, miss = _cross_entropy(pos[block] / temperature, logits)
        if need_dq:
            dq_hat[block] = (exps @ rows / total[:, None] - miss[:, None] * k_hat[block]) / temperature
    # exp(-inf) = 0 would swallow a queue row with an infinite feature; its mean similarity does not.
    loss += 0 * neg
    dq = through_norm(dq_hat, q_hat, norm) if need_dq else dq_hat[:0]
    stats = slice(None if need_stats else 0)
    return loss, dq, rank[stats], pos[stats], neg[stats]


@torch.no_grad()
def nt_xent(
    z: Tensor,  # (2N, C), raw: view 1 of every image, then view 2
    temperature: float,
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """NT-Xent of every view and the gradient of their sum, in one forward.

    With ``s_ij = z^_i.z^_j / T`` and i' the other view of i::

        loss_i = logsumexp_{j != i}(s_ij) - s_ii',    p_i = softmax_{j != i}(s_i)
        dz^_i  = (sum_{j != i, i'} (p_ij + p_ji) z^_j - (2 - p_ii' - p_i'i) z^_i') / T
        dz_i   = (dz^_i - z^_i (z^_i.dz^_i)) / |z_i|

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of
    Visual Representations", equation 1.

    Returns:
        loss (2N,), dz (2N, C) or (0, C): of the sum of the losses.
    """
    dtype = compute_dtype(z)
    z_hat, norm = normalise(z.to(dtype))
    rows = z.shape[0]
    index = torch.arange(rows, device=z.device)
    other = index.roll(rows // 2)
    loss, miss = z_hat.new_empty(rows), z_hat.new_empty(rows)
    dz_hat = torch.zeros_like(z_hat[: rows if need_dz else 0])
    for block in row_blocks(rows, rows):
        logits = (z_hat[block] @ z_hat.t()).div_(temperature)  # (rows of the block, 2N)
        positive = logits.gather(1, other[block, None])[:, 0]
        logits.scatter_(1, torch.stack([index[block], other[block]], dim=1), -torch.inf)
        loss[block], exps, total, miss[block] = _cross_entropy(positive, logits)
        if need_dz:
            dz_hat[block] += exps @ z_hat / total[:, None]
            dz_hat.addmm_(exps.t(), z_hat[block] / total[:, None])
    if not need_dz:
        return loss, dz_hat
    dz_hat = (dz_hat - (miss + miss[other])[:, None] * z_hat[other]) / temperature
    return loss, through_norm(dz_hat, z_hat, norm)


@torch.no_grad()
def contrast(
    q: Tensor,  # (D, N, C), raw
    k: Tensor,  # (D, M, C), raw, M >= N
    temperature: float,
    first: int,  # the positive of query i is key first + i
    precision: str,  # the least a backend must deliver; fp32 satisfies all
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of queries against the keys of a batch and its gradients, for D problems side by side.

    With ``s_ij = q^_i.k^_j / T``, ``y_i = first + i`` and p_i = softmax(s_i)::

        loss_i = logsumexp_j(s_ij) - s_iy
        dq^_i  = (sum_{j != y} p_ij k^_j - (1 - p_iy) k^_y) / T
        dk^_j  = (sum_{i: y_i != j} p_ij q^_i - sum_{i: y_i = j} (1 - p_ij) q^_i) / T

    and the gradients to q and k through their norms as in :func:`info_nce`.

    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised
    Vision Transformers", algorithm 1, without its factor 2T.

    Returns:
        loss (D, N), and of the sum of the losses dq (D, N, C) or (D, 0, C), dk (D, M, C) or (D, 0, C).
    """
    dtype = compute_dtype(q, k)
    q_hat, q_norm = normalise(q.to(dtype))
    k_hat, k_norm = normalise(k.to(dtype))
    problems, rows, _ = q.shape
    index = torch.arange(rows, device=q.device)
    own = slice(first, first + rows)
    own_hat = k_hat[:, own]
    loss = q_hat.new_empty((problems, rows))
    dq_hat = torch.empty_like(q_hat[:, : rows if need_dq else 0])
    dk_hat = torch.zeros_like(k_hat[:, : None if need_dk else 0])
    for block in row_blocks(rows, problems * k.shape[1]):
        logits = (q_hat[:, block] @ k_hat.mT).div_(temperature)  # (D, rows of the block, M)
        own_logits = (slice(None), index[block] - block.start, index[block] + first)
        positive = logits[own_logits]
        logits[own_logits] = -torch.inf
        loss[:, block], exps, total, miss = _cross_entropy(positive, logits)
        if need_dq:
            dq_hat[:, block] = exps @ k_hat / total[..., None] - miss[..., None] * own_hat[:, block]
        if need_dk:
            dk_hat.baddbmm_(exps.mT, q_hat[:, block] / total[..., None])
            dk_hat[:, own][:, block] -= miss[..., None] * q_hat[:, block]
    dq = through_norm(dq_hat / temperature, q_hat, q_norm) if need_dq else dq_hat
    dk = through_norm(dk_hat / temperature, k_hat, k_norm) if need_dk else dk_hat
    return loss, dq, dk
