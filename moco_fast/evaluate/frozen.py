"""That a backbone which is evaluated stays as it is.

Tests: tests/test_linear.py.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


class BackboneMovedError(RuntimeError):
    """A backbone that should have been frozen is not what it was; names what changed."""


def fingerprint(network: nn.Module) -> dict[str, str]:
    """Checksum of every parameter and buffer, by name; also of those that a state dict leaves out."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        name: hashlib.blake2b(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def check_unmoved(before: dict[str, str], network: nn.Module) -> None:
    """Raise BackboneMovedError unless the network is what it was when its fingerprint was taken."""
    after = fingerprint(network)
    if moved := [name for name in before | after if before.get(name) != after.get(name)]:
        raise BackboneMovedError(
            f"the backbone must stay frozen, but {len(moved)} of {len(after)} tensors changed: "
            f"{', '.join(moved[:3])}"
        )
