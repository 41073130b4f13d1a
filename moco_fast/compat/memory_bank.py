"""The bank of negatives inside :class:`moco_fast.compat.lightly.NTXentLoss`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moco_fast import checks, distributed
from moco_fast.queue import Ring


class MemoryBank(Ring):
    """Keys of past batches, oldest first out, under the names that lightly gives its bank.

    The bank starts with random unit rows. It is part of the state dict. A state dict without one, such as
    lightly's, leaves it as it is, with a warning.

    Args:
        size: ``(slots, dim)``; or ``slots`` alone, and ``dim`` is that of the first batch or of a state dict;
            0 for no bank.
        gather_distributed: the keys of all ranks go into the bank of every rank.

    Attributes:
        size: ``(slots, dim)``, ``(slots,)`` until dim is known.
        bank: (slots, dim) float32, or None.
        bank_ptr: (1,) int64, the row to be overwritten next, or None.

    Raises:
        TypeError: not integers.
        ValueError: negative, not one or two numbers, dim below 1.
    """

    bank: Tensor | None
    bank_ptr: Tensor | None

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        self.size = _checked(size)
        self.gather_distributed = gather_distributed
        self.register_buffer("bank", None)
        self.register_buffer("bank_ptr", None)
        if self.size[0] and len(self.size) == 2:
            self._hold(F.normalize(torch.randn(self.size), dim=1))

    @property
    def rows(self) -> Tensor:
        """The buffer ``bank``."""
        assert self.bank is not None
        return self.bank

    @property
    def pointer(self) -> Tensor:
        """The buffer ``bank_ptr``."""
        assert self.bank_ptr is not None
        return self.bank_ptr

    def prepare(
        self,
        out: Tensor,  # (N, dim)
    ) -> None:
        """Make a bank for such rows if there is none yet, and bring it to their device.

        Raises:
            ValueError: rows of another width than the bank's.
        """
        if self.bank is None:
            self._hold(F.normalize(torch.randn((self.size[0], out.shape[1]), device=out.device), dim=1))
        if out.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"out0 and out1 must have shape (N, {self.rows.shape[1]}) for a memory bank of size "
                f"{self.size}, got {tuple(out.shape)}"
            )
        if self.rows.device != out.device:  # scripts move their model, seldom their loss
            self.to(out.device)

    def update_(
        self,
        keys: Tensor,  # (N, dim), raw
    ) -> None:
        """Replace the oldest rows; of more keys than rows, the last ones stay."""
        if self.gather_distributed:
            keys = distributed.all_gather_rows(keys)
        self.enqueue_(keys[-self.size[0] :])

    def extra_repr(self) -> str:
        return f"size={self.size}, gather_distributed={self.gather_distributed}"

    def _hold(self, rows: Tensor) -> None:
        self.size = tuple(rows.shape)
        self.bank, self.bank_ptr = rows, torch.zeros(1, dtype=torch.long, device=rows.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}bank")
        if saved is None:
            if self.bank is not None:
                warnings.warn(
                    f"the state dict has no {prefix}bank, as lightly saves none: the bank stays as it is",
                    stacklevel=2,
                )
            return
        if self.bank is None and self.size[0] and saved.ndim == 2:
            self._hold(torch.empty(self.size[0], saved.shape[1], device=saved.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _checked(size: object) -> tuple[int, ...]:
    numbers = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"memory_bank_size must be an integer or a pair of them, got {size!r}")
        if number < 0:
            raise ValueError(f"memory_bank_size must not be negative, got {size!r}")
    if len(numbers) not in (1, 2):
        raise ValueError(f"memory_bank_size must be slots or (slots, dim), got {size!r}")
    if len(numbers) == 2 and numbers[0]:
        checks.count("dim of memory_bank_size", numbers[1])
    return numbers
