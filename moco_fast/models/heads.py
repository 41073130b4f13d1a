"""The classification head of a backbone: finding it, and putting a projection MLP in its place."""

from __future__ import annotations

from torch import nn

HEAD_NAMES = ("fc", "head", "classifier", "heads")


def head_path(encoder: nn.Module) -> str:
    """Return the dotted name of the last linear layer inside the encoder's head.

    torchvision and timm name heads ``fc``, ``head``, ``classifier`` or
    ``heads``; some hold the linear layer deeper, as in ``classifier.2``.

    Raises:
        ValueError: no such head, or none with a linear layer.
    """
    for name in HEAD_NAMES:
        head = getattr(encoder, name, None)
        if not isinstance(head, nn.Module):
            continue
        linears = [path for path, layer in head.named_modules(prefix=name) if isinstance(layer, nn.Linear)]
        if linears:
            return linears[-1]
    children = ", ".join(name for name, _ in encoder.named_children()) or "none"
    raise ValueError(
        f"base_encoder must have a linear head named {', '.join(HEAD_NAMES)}; "
        f"{type(encoder).__name__} has the children {children}"
    )


def insert_mlp(encoder: nn.Module, path: str) -> None:
    """Replace the linear layer at ``path`` by linear, ReLU, that layer: the projection MLP of MoCo v2.

    Source: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 2.
    """
    linear = encoder.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    width = linear.in_features
    owner, _, name = path.rpartition(".")
    # named by index, so that a ResNet's keys are fc.0.* and fc.2.*
    setattr(encoder.get_submodule(owner), name, nn.Sequential(nn.Linear(width, width), nn.ReLU(), linear))
