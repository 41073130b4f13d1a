"""A MoCo v3 with the official semantics, written out in plain PyTorch: what moco_fast's has to equal.

Formulas and order of Chen, Xie, He 2021, algorithm 1; logits, labels, and a loop over parameters, on one
device or several.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bench.eager_moco import gathered


class EagerMoCoV3(nn.Module):
    """Constructor, call and output of the official classes; ``head`` names the encoder's last layer."""

    head = "fc"
    projector_layers, predictor_norm = 2, False

    def __init__(self, base_encoder, dim=256, mlp_dim=4096, T=1.0):
        super().__init__()
        self.T = T
        self.base_encoder = base_encoder(num_classes=mlp_dim)
        self.momentum_encoder = base_encoder(num_classes=mlp_dim)
        for encoder in (self.base_encoder, self.momentum_encoder):
            width = getattr(encoder, self.head).in_features
            layers = perceptron(self.projector_layers, width, mlp_dim, dim, last_norm=True)
            setattr(encoder, self.head, layers)
        self.predictor = perceptron(2, dim, mlp_dim, dim, last_norm=self.predictor_norm)
        for base, follower in zip(
            self.base_encoder.parameters(), self.momentum_encoder.parameters(), strict=True
        ):
            follower.data.copy_(base.data)
            follower.requires_grad = False

    def forward(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        q1 = self.predictor(self.base_encoder(x1))
        q2 = self.predictor(self.base_encoder(x2))
        with torch.no_grad():
            self.update_momentum_encoder(m)
            k1, k2 = self.momentum_encoder(x1), self.momentum_encoder(x2)
        return self.one_direction(q1, k2) + self.one_direction(q2, k1)

    def one_direction(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        labels = torch.arange(len(q), device=q.device)
        if dist.is_initialized():
            labels, k = labels + len(q) * dist.get_rank(), gathered(k)
        return F.cross_entropy(torch.einsum("nc,mc->nm", q, k) / self.T, labels) * (2 * self.T)

    def update_momentum_encoder(self, m: float) -> None:
        for base, follower in zip(
            self.base_encoder.parameters(), self.momentum_encoder.parameters(), strict=True
        ):
            follower.data = follower.data * m + base.data * (1.0 - m)


class EagerMoCoV3ViT(EagerMoCoV3):
    """The variant for vision transformers."""

    head = "head"
    projector_layers, predictor_norm = 3, True


def perceptron(count, width, hidden, out, last_norm):
    """``count`` linear layers without bias, each but the last followed by batch norm and ReLU."""
    layers = []
    for i in range(count):
        last = i == count - 1
        layers.append(nn.Linear(width if i == 0 else hidden, out if last else hidden, bias=False))
        if not last:
            layers += [nn.BatchNorm1d(hidden), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*layers)
