"""What the model of every method offers beside its own call: the encoder that it is for, and its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moco_fast.models import heads


def not_broadcast(*buffers: str) -> tuple[str, ...]:
    """What ``_ddp_params_and_buffers_to_ignore`` has to name, also where torch.compile wraps the model."""
    return (*buffers, *(f"_orig_mod.{name}" for name in buffers))


class Method(nn.Module):
    """Base of all models. A subclass sets ``encoder`` and ``head`` when it is built.

    Attributes:
        encoder: what is pretrained and kept; a submodule, or a property that returns one of another name.
        head: dotted path, inside the encoder, of what follows the pooled features; "" if there is none.
        UNCALLED: methods of the official class that ours does without: name, and what to do instead of
            overriding it.
    """

    UNCALLED: ClassVar[Mapping[str, str]] = {}

    head: str

    if TYPE_CHECKING:

        @property
        def encoder(self) -> nn.Module:
            """Read-only here, so that a subclass may have either."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a method in a subclass that its ``forward``, if it is ours, would never call."""
        super().__init_subclass__(**options)
        if cls.forward.__module__.startswith("moco_fast."):
            for own in cls.__mro__:
                if own.__module__.startswith("moco_fast."):
                    break
                for name in cls.UNCALLED.keys() & vars(own).keys():
                    raise TypeError(f"{own.__name__}.{name} would never be called: {cls.UNCALLED[name]}")

    def __setattr__(self, name: str, value: Any) -> None:
        # A module goes into a list of its own, behind what the class has by that name.
        if isinstance(value, nn.Module) and hasattr(type(self), name):
            raise TypeError(
                f"{name!r} is a name of {type(self).__name__}'s own, behind which the module would be lost: "
                "choose another"
            )
        super().__setattr__(name, value)

    def features(
        self,
        images: Tensor,  # (N, ...)
    ) -> Tensor:
        """Pooled features of the encoder, before its head: what the pretraining is for.

        Returns:
            (N, F), without gradient. Uses the current mode: call ``eval()`` first.

        Raises:
            ValueError: the encoder has no head that :func:`moco_fast.models.heads.head_path` finds.
        """
        captured: list[Tensor] = []
        head = self.encoder.get_submodule(self.head or heads.head_path(self.encoder))
        hook = head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                self.encoder(images)
        finally:
            hook.remove()
        return captured[0]
