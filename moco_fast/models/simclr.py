"""SimCLR: both views of every image against all other views of the batch.

Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of
Visual Representations", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks, distributed, ops
from moco_fast.models import heads, steps
from moco_fast.models.method import Method


class SimCLR(Method):
    """One encoder with a projection MLP, trained by NT-Xent over the 2N views of a batch.

    The head is the paper's: linear, ReLU, linear, with a hidden layer as wide as the features (section 4.2),
    and no batch norm. Both views pass the encoder as one batch, so its batch norms see all 2N of them.

    Over several ranks the batch is that of all of them.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``.
        dim: features of the embedding.
        T: softmax temperature, above 0. The paper's best on ImageNet is 0.1, on CIFAR-10 0.5.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = SimCLR(torchvision.models.resnet50, 128, T=0.1)
        >>> loss = model(view_1, view_2)
    """

    encoder: nn.Module

    def __init__(self, base_encoder: Callable[..., nn.Module], dim: int = 128, T: float = 0.1) -> None:
        super().__init__()
        self.T = checks.temperature("T", T)
        encoder, self.head = steps.build_encoder(base_encoder, dim)
        heads.insert_mlp(encoder, self.head)
        self.encoder = encoder

    def forward(
        self,
        x1: Tensor,  # (N, ...)
        x2: Tensor,  # (N, ...)
        *,
        return_stats: bool = False,
    ) -> Any:
        """NT-Xent of one view and the other; in training over the images of all ranks.

        Args:
            x1: one view of every image.
            x2: the other, of the same shape.
            return_stats: also return means over all views.

        Returns:
            The mean loss over all views, the same on every rank; with ``return_stats`` also a dict of the
            means that :meth:`moco_fast.ops.InfoNCEStats.means` names.

        Raises:
            TypeError, ValueError: views that are no images or do not match, a temperature out of range.
            Disagreement: on every rank, if ranks were given different things.
        """
        steps.agree(self, lambda: self._facts(x1, x2), getattr(x1, "device", None))
        z = self.encoder(torch.cat([x1, x2])).unflatten(0, (2, -1))  # (2, N, dim)
        if self.training:
            # Ranks come first in what is gathered. The loss is that of all images, the same on every rank.
            z = distributed.all_gather_rows_with_grad(z.transpose(0, 1), same_loss=True).transpose(0, 1)
        loss = ops.nt_xent(z[0], z[1], self.T)
        if not return_stats:
            return loss
        index = torch.arange(z.shape[0] * z.shape[1], device=z.device)
        flat = z.flatten(0, 1)
        return loss, steps.pair_stats(flat, flat, index.roll(z.shape[1]), itself=index)

    def _facts(self, x1: Tensor, x2: Tensor) -> dict[str, object]:
        T = checks.temperature("T", self.T)  # may have been set since the constructor
        return steps.check_views(x1=x1, x2=x2, same_shape=True) | {"T": T}
