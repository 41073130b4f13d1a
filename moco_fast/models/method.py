"""What the model of every method offers beside its own call: the encoder that it is for, and its features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


class Method(nn.Module):
    """Base of all models. A subclass sets ``encoder`` and ``head`` when it is built.

    Attributes:
        encoder: what is pretrained and kept; a submodule, or a property that returns one of another name.
        head: dotted path, inside the encoder, of what follows the pooled features.
    """

    head: str

    if TYPE_CHECKING:

        @property
        def encoder(self) -> nn.Module:
            """Read-only here, so that a subclass may have either."""

    def features(
        self,
        images: Tensor,  # (N, ...)
    ) -> Tensor:
        """Pooled features of the encoder, before its head: what the pretraining is for.

        Returns:
            (N, F), without gradient. Uses the current mode: call ``eval()`` first.
        """
        captured: list[Tensor] = []
        head = self.encoder.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                self.encoder(images)
        finally:
            hook.remove()
        return captured[0]
