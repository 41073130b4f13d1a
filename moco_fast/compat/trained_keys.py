"""InfoNCE whose keys may want a gradient, as in scripts whose loss was plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moco_fast import ops


def info_nce(
    q: Tensor,  # (N, C)
    k: Tensor,  # (N, C)
    queue: Tensor,  # (K, C)
    temperature: float,
) -> Tensor:
    """The mean of :func:`moco_fast.info_nce` over the queries, with a gradient to ``k`` too if it wants one.

    Only the positive logit depends on a key: ``dk^_i = -(1 - p_i) q^_i / (N T)``, and as the loss of a query
    is ``-log p_i``, ``1 - p_i`` follows from it. No further pass over the queue.

    Raises:
        TypeError, ValueError: as :func:`moco_fast.info_nce`.
    """
    if not (k.requires_grad and torch.is_grad_enabled()):
        return ops.info_nce(q, k.detach(), queue, temperature)
    rows = ops.info_nce(q, k.detach(), queue, temperature, reduction="none")
    miss = -torch.expm1(-rows.detach())
    q_hat, k_hat = (F.normalize(x.to(rows.dtype), dim=1) for x in (q.detach(), k))
    pull = -(miss * (q_hat * k_hat).sum(dim=1)).mean() / temperature
    return rows.mean() + (pull - pull.detach())  # a term of value 0 that has the keys' gradient
