"""NT-Xent over two views of N images, loss and gradient, without the 2N x 2N similarities.

With z^ the 2N normalised rows, s_ij = z^_i.z^_j / T, i' the other view of i and
L_i = log sum_{j != i} exp(s_ij)::

    loss_i = L_i - s_ii',          p_ij = exp(s_ij - L_i)
    dz^_i  = (sum_{j != i, i'} (p_ij + p_ji) z^_j - (2 - p_ii' - p_i'i) z^_i') / T

s is symmetric, so the second pass needs no sum over the other index: it is the
gradient to the rows with the log-sum-exps of the first. Operands are normalised
once; see ``pairs`` for the passes. 6 C (2N)^2 FLOP and 2 (2N)^2 exponentials,
three times the latter below T = 0.02.

Reference: moco_fast.reference.nt_xent.  Tests: tests/test_nt_xent.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco_fast.kernels import pairs


def nt_xent(
    z: Tensor,  # (2N, C) raw, view 1 then view 2
    temperature: float,
    precision: str,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`moco_fast.reference.nt_xent`."""
    rows, features = z.shape
    raw = z.contiguous()[None]
    z_hat = pairs.operand(raw, precision)

    def sweep(gradient: bool, log2_sum: Tensor | None = None) -> pairs.Partial:
        return pairs.sweep(
            z_hat, z_hat, 1, rows, rows, features, temperature,
            first=0, paired=True, gradient=gradient, x_log2_sum=log2_sum, y_log2_sum=log2_sum,
        )  # fmt: skip

    found = pairs.losses(raw, raw, sweep(False), temperature, first=0, paired=True, gradient=False)
    if not need_dz:
        return found.loss[0], torch.empty((0, features), device=z.device, dtype=torch.float32)
    part = sweep(True, found.log2_sum)
    dz = pairs.gradients(raw, raw, part, found.miss, temperature, first=0, paired=True)
    return found.loss[0], dz[0]
