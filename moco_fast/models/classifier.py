"""A backbone whose head is a linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moco_fast.models.method import Method

HEAD_STD = 0.01  # of the weights of a fresh classifier, whose guesses are then all alike


class Classifier(Method):
    """Logits of a pretrained backbone with a fresh linear layer.

    The backbone's own names stay, under ``encoder``, and the linear layer is where its head was.

    Args:
        backbone: pooled features (N, width), with an Identity at ``head``; taken over, not copied.
        head: dotted path of the head.
        width: features that the head takes.
        classes: number of classes.
    """

    encoder: nn.Module

    def __init__(self, backbone: nn.Module, head: str, width: int, classes: int) -> None:
        super().__init__()
        linear = nn.Linear(width, classes)
        with torch.no_grad():
            linear.weight.normal_(std=HEAD_STD)
            linear.bias.zero_()
        owner, _, name = head.rpartition(".")
        setattr(backbone.get_submodule(owner), name, linear)
        self.encoder = backbone
        self.head = head

    def forward(
        self,
        images: Tensor,  # (N, C, S, S)
    ) -> Tensor:
        """Logits (N, classes)."""
        return self.encoder(images)
