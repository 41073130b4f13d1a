"""Learning rates that fall from the head of a network to its stem.

Tests: tests/test_layers.py.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# blocks.3 of timm, encoder_layer_3 of torchvision's transformers, layer3 of ResNets.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks\.|encoder_layer_|layer)(\d+)\.")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with the factor on their learning rate under ``lr_scale``.

    Layer l of L has the factor ``layer_decay ** (L - l)``: 0 is what comes before the first block in the
    order of parameters, L what comes after the last. Biases, norms and other vectors, and the tokens and
    position embeddings of transformers, have no weight decay.

    Args:
        model: whose parameters, those that are trained.
        weight_decay: of weights of two and more dimensions.
        layer_decay: factor between one layer and the next, in (0, 1].

    Raises:
        ValueError: ``layer_decay`` < 1 for a network without numbered blocks.

    Source: Clark et al. 2020, "ELECTRA", appendix A; for images Bao et al. 2022, "BEiT", appendix.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = [_BLOCK.search(name) for name, _ in named]
    numbers = sorted({int(match[1]) for match in found if match})
    if layer_decay < 1 and not numbers:
        raise ValueError(
            f"layer_decay={layer_decay} needs an encoder made of layers named blocks.N, encoder_layer_N or "
            "layerN, and this one has none"
        )
    last = len(numbers) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    layer, seen = 0, False
    for (name, parameter), match in zip(named, found, strict=True):
        seen = seen or match is not None
        layer = numbers.index(int(match[1])) + 1 if match else (last if seen else 0)
        decays = parameter.ndim > 1 and not re.search(r"token|pos_?embed", name)
        group = {
            "params": [],
            "lr_scale": layer_decay ** (last - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())
