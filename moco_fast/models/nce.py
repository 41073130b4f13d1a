"""Noise-contrastive estimation with a constant normaliser: the loss of instance discrimination.

Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination", section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moco_fast.models.steps import BLOCK


def nce(
    features: Tensor,  # (N, C), rows of unit norm
    positive: Tensor,  # (N, C), rows of unit norm, constant
    drawn: Tensor,  # (K, C), rows of unit norm, constant
    temperature: float,
    Z: Tensor,  # () float64
    count: int,
) -> Tensor:
    """NCE of every feature: is a row its own image's, or one of K drawn from all ``count``?

    With ``P(v) = exp(v.f / T) / Z`` and ``h = P / (P + K / count)``::

        loss_i = -log h(positive_i) - sum_j log(1 - h(drawn_j))
               = softplus(-a_i) + sum_j softplus(a_ij),   a = v.f / T - log(Z K / count)

    The gradient, to the features, is computed in the forward pass; both take the drawn rows in blocks, so
    that memory does not grow with N K.

    Returns:
        (N,).
    """
    shift = (Z.log() + math.log(drawn.shape[0] / count)).to(features.dtype)
    return _NCE.apply(features, positive, drawn, temperature, shift)


@torch.no_grad()
def estimated_normaliser(
    features: Tensor,  # (N, C), rows of unit norm
    drawn: Tensor,  # (K, C), rows of unit norm
    temperature: float,
    count: int,
) -> Tensor:
    """``Z = count * mean_ij exp(v_j.f_i / T)``, the Monte Carlo estimate of equation 8, () float64."""
    with torch.autocast(features.device.type, enabled=False):
        sums = [
            torch.logsumexp(features @ block.t() / temperature, dim=(0, 1))
            for block in _blocks(features, drawn)
        ]
    pairs = features.shape[0] * drawn.shape[0]
    return torch.exp(torch.logsumexp(torch.stack(sums).double(), dim=0) + math.log(count / pairs))


class _NCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, positive, drawn, temperature, shift):
        with torch.autocast(features.device.type, enabled=False):
            a = (features * positive).sum(dim=1) / temperature - shift
            loss, gradient = -F.logsigmoid(a), -torch.sigmoid(-a)[:, None] * positive
            for block in _blocks(features, drawn):
                a = features @ block.t() / temperature - shift
                loss = loss - F.logsigmoid(-a).sum(dim=1)
                gradient = gradient + torch.sigmoid(a) @ block
        ctx.save_for_backward(gradient / temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None, None, None


def _blocks(features: Tensor, drawn: Tensor) -> tuple[Tensor, ...]:
    return drawn.split(max(1, BLOCK // features.shape[0]))
