"""What the model of every method offers beside its own call: the encoder that it is for, and its features."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Method(nn.Module):
    """Base of all models. A subclass names its encoder, and sets ``head`` when it is built.

    Attributes:
        ENCODER: name of the submodule that is pretrained and kept.
        encoder: that submodule, which may have this very name.
        head: dotted path, inside the encoder, of what follows the pooled features.
    """

    ENCODER: ClassVar[str]
    encoder: nn.Module
    head: str

    def __getattr__(self, name: str) -> Any:  # of what is no plain attribute, as submodules are
        return super().__getattr__(self.ENCODER if name == "encoder" else name)

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
