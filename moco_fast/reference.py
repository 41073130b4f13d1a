"""Every op in plain PyTorch: oracle of the tests, baseline of the benchmarks, fallback on any device.

Each function has the contract that every backend has to meet: arguments
already checked, arithmetic in fp32 (float64 if an operand is float64), nothing
read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm a row is divided by, as in torch.nn.functional.normalize


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or float64 if a tensor is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def normalise(
    x: Tensor,  # (N, C)
) -> tuple[Tensor, Tensor]:
    """Return ``x / max(|x|, EPS)`` row by row, and the norms (N, 1)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.clamp_min(EPS), norm


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
    similarities = q_hat @ rows.t()  # (N, K)
    neg = similarities.mean(dim=1)
    stats = slice(None if need_stats else 0)
    rank = (similarities > pos[:, None]).sum(dim=1)[stats]

    logits = similarities / temperature
    top = torch.maximum(logits.amax(dim=1), pos / temperature)
    exps = torch.exp(logits - top[:, None])
    negatives = exps.sum(dim=1)
    positive = torch.exp(pos / temperature - top)
    # log1p keeps the digits of a loss near zero, where the positive dominates.
    loss = torch.where(
        positive == 1, torch.log1p(negatives), torch.log(negatives + positive) + top - pos / temperature
    )
    # exp(-inf) = 0 would swallow a queue row with an infinite feature; its mean similarity does not.
    loss = loss + 0 * neg

    if not need_dq:
        return loss, q.new_empty((0, q.shape[1]), dtype=dtype), rank, pos[stats], neg[stats]
    total = negatives + positive
    dq_hat = ((exps / total[:, None]) @ rows - (negatives / total)[:, None] * k_hat) / temperature
    radial = (q_hat * dq_hat).sum(dim=1, keepdim=True)
    # A norm below EPS was clamped to a constant, through which no gradient flows.
    dq = (dq_hat - torch.where(norm >= EPS, radial * q_hat, 0)) / norm.clamp_min(EPS)
    return loss, dq, rank, pos[stats], neg[stats]


def ema_update_(
    targets: Sequence[Tensor],  # any shapes
    sources: Sequence[Tensor],  # same shapes and order
    m: Tensor,  # () on the CPU or on the tensors' device
    masters: Sequence[Tensor] = (),  # fp32, one per target, or none at all
) -> None:
    """``target <- m * target + (1 - m) * source`` for every pair, in place.

    With masters ``master <- m * master + (1 - m) * source`` and ``target <- master``, rounded.
    """
    for state, target, source in zip(masters or targets, targets, sources, strict=True):
        dtype = compute_dtype(state, source)
        # (1 - m) is rounded once, from the precision m came in, as a Python scalar would be.
        keep, take = m.to(dtype), (1 - m).to(dtype)
        state.copy_(state.to(dtype) * keep + source.to(dtype) * take)
        if state is not target:
            target.copy_(state)


def enqueue_(
    queue: Tensor,  # (K, C)
    ptr: Tensor,  # (1,) int64
    keys: Tensor,  # (N, C), raw, N <= K
    mirror: Tensor | None = None,  # (K, C)
) -> None:
    """Write the normalised keys to rows ``ptr, ptr + 1, ...`` modulo K and advance ``ptr``."""
    slots, count = queue.shape[0], keys.shape[0]
    rows, _ = normalise(keys.to(compute_dtype(queue, keys)))
    index = (ptr + torch.arange(count, device=queue.device)) % slots
    queue.index_copy_(0, index, rows.to(queue.dtype))
    if mirror is not None:
        mirror.index_copy_(0, index, rows.to(mirror.dtype))
    ptr.copy_((ptr + count) % slots)
