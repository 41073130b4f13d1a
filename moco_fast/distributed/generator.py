"""Random numbers that are the same on every rank, without an exchange beyond that of one seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moco_fast.distributed.collectives import broadcast_


class CommonGenerator:
    """A random generator that ranks agree on once.

    Attributes:
        generator: on the CPU; None until ranks agree.
    """

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None

    def agree(self, device: torch.device) -> None:
        """Make the generator, from the seed of rank 0's global one. Called by all ranks."""
        # initial_seed() draws nothing: what else the seed decides stays as it is without this generator.
        seed = torch.tensor([torch.initial_seed() % 2**63], device=device)
        broadcast_(seed)
        self.generator = torch.Generator().manual_seed(int(seed))

    def digest(self) -> str | None:
        """Tells one state from another; None before the first."""
        state = self.state()
        return None if state is None else hashlib.blake2b(state.numpy().tobytes(), digest_size=8).hexdigest()

    def state(self) -> Tensor | None:
        """The generator's state, for a checkpoint; None before the first."""
        return None if self.generator is None else self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Go on where :meth:`state` was taken."""
        self.generator = torch.Generator()
        self.generator.set_state(state.cpu())  # wherever the checkpoint was loaded to
