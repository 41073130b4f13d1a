"""End-to-end contrast: the keys of the batch are the dictionary, with gradient to them.

Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual
Representation Learning", section 3.3 and figure 2a.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks, distributed, ops
from moco_fast.models import heads, steps
from moco_fast.models.method import Method


class EndToEnd(Method):
    """One encoder for queries and keys, whose negatives are the other keys of the batch.

    What MoCo replaces by a queue: here the dictionary is as large as the batch. Over several ranks it is that
    of all of them.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``.
        dim: features of the embedding.
        T: softmax temperature, above 0.
        mlp: projection MLP instead of a linear layer, as in MoCo v2.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = EndToEnd(torchvision.models.resnet50, 128, T=0.2, mlp=True)
        >>> loss = model(view_1, view_2)
    """

    encoder: nn.Module

    def __init__(
        self, base_encoder: Callable[..., nn.Module], dim: int = 128, T: float = 0.07, mlp: bool = False
    ) -> None:
        super().__init__()
        self.T = checks.temperature("T", T)
        encoder, self.head = steps.build_encoder(base_encoder, dim)
        if mlp:
            heads.insert_mlp(encoder, self.head)
        self.encoder = encoder

    def forward(
        self,
        x1: Tensor,  # (N, ...)
        x2: Tensor,  # (N, ...)
        *,
        return_stats: bool = False,
    ) -> Any:
        """Cross-entropy of the queries of x1 against the keys of x2; in training against those of all ranks.

        Args:
            x1: one view of every image.
            x2: the other.
            return_stats: also return means over the queries.

        Returns:
            The mean loss over this rank's queries; with ``return_stats`` also a dict of the means that
            :meth:`moco_fast.ops.InfoNCEStats.means` names.

        Raises:
            TypeError, ValueError: views that are no images or not as many, a temperature out of range.
            Disagreement: on every rank, if ranks were given different things.
        """
        steps.agree(self, lambda: self._facts(x1, x2), getattr(x1, "device", None))
        q, keys = self.encoder(x1), self.encoder(x2)
        first = 0  # row that is the key of the first query
        if self.training:
            first = distributed.own_rows(len(keys)).start
            keys = distributed.all_gather_rows_with_grad(keys, same_loss=False)
        loss = ops.contrast(q, keys, self.T, first=first)
        if not return_stats:
            return loss
        return loss, steps.pair_stats(q, keys, first + torch.arange(len(q), device=q.device))

    def _facts(self, x1: Tensor, x2: Tensor) -> dict[str, object]:
        T = checks.temperature("T", self.T)  # may have been set since the constructor
        return steps.check_views(x1=x1, x2=x2) | {"T": T}
