"""Cross-entropy of queries against the keys of a batch, loss and gradients, without the N x M logits.

With q^ (N, C), k^ (M, C) the normalised rows, s_ij = q^_i.k^_j / T, y_i = first + i
and L_i = log sum_j exp(s_ij)::

    loss_i = L_i - s_iy,           p_ij = exp(s_ij - L_i)
    dq^_i  = (sum_{j != y} p_ij k^_j - (1 - p_iy) k^_y) / T
    dk^_j  = (sum_{i: y_i != j} p_ij q^_i - sum_{i: y_i = j} (1 - p_ij) q^_i) / T

One pass over the pairs finds the loss and dq. dk, if wanted, is a second with the
roles exchanged and L given; see ``pairs``. D problems, such as the two directions
of MoCo v3, share every launch. 4 D N M C FLOP and D N M exponentials, twice that
with dk.

Reference: moco_fast.reference.contrast.  Tests: tests/test_contrast.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast.kernels import pairs


def contrast(
    q: Tensor,  # (D, N, C) raw
    k: Tensor,  # (D, M, C) raw
    temperature: float,
    first: int,
    precision: str,
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moco_fast.reference.contrast`."""
    q, k = q.contiguous(), k.contiguous()
    (problems, queries, features), keys = q.shape, k.shape[1]
    q_hat, k_hat = pairs.operand(q, precision), pairs.operand(k, precision)

    part = pairs.sweep(
        q_hat, k_hat, problems, queries, keys, features, temperature,
        first=first, paired=False, gradient=need_dq,
    )  # fmt: skip
    found = pairs.losses(q, k, part, temperature, first=first, paired=False, gradient=need_dq)
    if not need_dk:
        return (
            found.loss,
            found.dx,
            torch.empty((problems, 0, features), device=q.device, dtype=torch.float32),
        )
    part = pairs.sweep(
        k_hat, q_hat, problems, keys, queries, features, temperature,
        first=-first, paired=False, gradient=True, y_log2_sum=found.log2_sum,
    )  # fmt: skip
    dk = pairs.gradients(k, q, part, found.miss, temperature, first=-first, paired=False)
    return found.loss, found.dx, dk
