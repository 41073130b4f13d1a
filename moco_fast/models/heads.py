"""The classification head of a backbone: finding it, and putting a projection MLP in its place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from moco_fast import checks

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
    # named by index, so that a ResNet's keys are fc.0.* and fc.2.*
    replace(encoder, path, nn.Sequential(nn.Linear(width, width), nn.ReLU(), linear))


def mlp(
    dims: Sequence[int],  # features of the input, of every hidden layer, of the output
    *,
    last_norm: bool,
    last_bias: bool = False,
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them: the projectors and predictors of MoCo v3.

    ``Linear, BN, ReLU, ..., Linear[, BN]``. A linear layer before a batch norm, which would take a bias away,
    has none.

    Args:
        dims: at least two.
        last_norm: a batch norm without weight and bias after the last layer.
        last_bias: a bias of the last layer.

    Raises:
        TypeError, ValueError: fewer than two dims, or one that is not a positive integer.

    Source: Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", section 3.
    """
    if len(dims) < 2:
        raise ValueError(f"dims must hold those of the input and of the output, got {list(dims)}")
    for i, dim in enumerate(dims):
        checks.count(f"dims[{i}]", dim)
    layers: list[nn.Module] = []
    for width, out in pairwise(dims[:-1]):
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=False))
    return nn.Sequential(*layers)


def replace(encoder: nn.Module, path: str, head: nn.Module) -> None:
    """Put ``head`` where the module at ``path`` is."""
    owner, _, name = path.rpartition(".")
    setattr(encoder.get_submodule(owner), name, head)
