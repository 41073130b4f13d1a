"""SimSiam: two views, a predictor and a stop-gradient; no negatives, no momentum encoder.

Source: Chen and He 2021, "Exploring Simple Siamese Representation Learning".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks
from moco_fast.models import heads, steps
from moco_fast.models.method import Method
from moco_fast.reference import compute_dtype


class SimSiam(Method):
    """An encoder whose predicted embedding of one view shall be that of the other.

    ``loss = -(cos(h(z_1), z_2) + cos(h(z_2), z_1)) / 2`` with z held constant (section 3). The projector has
    three layers of ``dim``, each with a batch norm, the last of which has no weights, and ReLU between them;
    the predictor h two, with ``pred_dim`` features in between, of which only the last has a bias.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``.
        dim: features of the embedding and of the projector's hidden layers.
        pred_dim: features of the predictor's hidden layer, a bottleneck.
        stop_gradient: False lets the gradient through to z, which collapses: every image gets the same
            embedding, and the loss is -1 (section 4.1).

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = SimSiam(torchvision.models.resnet50)
        >>> loss = model(view_1, view_2)
    """

    encoder: nn.Module

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 2048,
        pred_dim: int = 512,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        checks.count("pred_dim", pred_dim)
        self.stop_gradient = stop_gradient
        encoder, self.head = steps.build_encoder(base_encoder, dim)
        width: Any = encoder.get_submodule(self.head).in_features
        heads.replace(encoder, self.head, heads.mlp([width, dim, dim, dim], last_norm=True))
        self.encoder = encoder
        self.predictor = heads.mlp([dim, pred_dim, dim], last_norm=False, last_bias=True)

    def forward(
        self,
        x1: Tensor,  # (N, ...)
        x2: Tensor,  # (N, ...)
        *,
        return_stats: bool = False,
    ) -> Any:
        """The symmetrised negative cosine, in [-1, 1].

        Args:
            x1: one view of every image.
            x2: the other.
            return_stats: also return means over the embeddings z.

        Returns:
            The mean loss; with ``return_stats`` also a dict of the means that
            :meth:`moco_fast.ops.InfoNCEStats.means` names. A "neg_sim" near 1 is a collapse.

        Raises:
            TypeError, ValueError: views that are no images, or not as many.
            Disagreement: on every rank, if ranks were given different things.
        """
        steps.agree(self, lambda: steps.check_views(x1=x1, x2=x2), getattr(x1, "device", None))
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        target1, target2 = (z1.detach(), z2.detach()) if self.stop_gradient else (z1, z2)
        loss = -(_cosines(p1, target2) + _cosines(p2, target1)).mean() / 2
        if not return_stats:
            return loss
        return loss, steps.pair_stats(z1, z2, torch.arange(len(z1), device=z1.device))


def _cosines(
    a: Tensor,  # (N, C)
    b: Tensor,  # (N, C)
) -> Tensor:
    """Cosine of every pair of rows, (N,), in fp32 or float64 whatever autocast wants."""
    dtype = compute_dtype(a, b)
    return (F.normalize(a.to(dtype), dim=1) * F.normalize(b.to(dtype), dim=1)).sum(dim=1)
