"""What logits follow from, and the queue as it was when they did."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moco_fast.models.moco import contrast_logits
from moco_fast.reference.common import compute_dtype, normalise
from moco_fast.reference.losses import through_norm


@dataclass(eq=False)
class QueueSnapshot:
    """The queue as it was: the buffer, and the rows that were overwritten since.

    Whoever overwrites rows saves them here as long as somebody holds the snapshot: logits do, and what
    followed from true ones. The graph of a fused loss does not, so that losses which are kept keep no queue.

    Attributes:
        rows: (K, C), a view of the buffer.
        undo: slots and the keys that they held, in the order in which they were overwritten.
        version: of the buffer, as far as ``undo`` explains it.
    """

    rows: Tensor
    undo: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.version = self.rows._version

    def save(
        self,
        slots: Tensor,  # (N,), those that follow on what was saved last
        keys: Tensor,  # (N, C), in them
    ) -> None:
        """Save rows that are about to be overwritten, unless all rows have been saved."""
        if sum(len(saved) for saved, _ in self.undo) < len(self.rows):
            self.undo.append((slots, keys))

    def restore(self) -> Tensor:
        """A copy of the rows, (K, C).

        Raises:
            RuntimeError: something else was written to the queue.
        """
        if self.rows._version != self.version:
            raise RuntimeError(
                "true logits were asked for after the queue they follow from had been replaced, as "
                "load_state_dict does: ask before"
            )
        rows = self.rows.clone()
        for slots, keys in reversed(self.undo):
            rows.index_copy_(0, slots, keys)
        return rows


@dataclass(eq=False)
class Source:
    """What logits follow from, all without gradient."""

    q: Tensor  # (N, C), raw
    k: Tensor  # (N, C), raw
    queue: weakref.ref[QueueSnapshot]
    slots: int  # K
    temperature: float
    loss: Tensor  # (N,)
    rank: Tensor  # (N,) negatives above the positive
    labels: Tensor  # (N,) int64, all 0 as long as nothing was written to them
    dtype: torch.dtype  # of the logits
    true: Tensor | None = None  # (N, 1 + K), once it was needed
    exposed: bool = False  # whether somebody can write to the true ones unnoticed
    pinned: QueueSnapshot | None = None  # from then on, for the gradient

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], 1 + self.slots

    @property
    def changed(self) -> bool:
        """Whether something was, or without a count of writes may have been, written to the true logits."""
        return self.exposed or (
            self.true is not None and (self.true.is_inference() or self.true._version > 0)
        )

    @torch.no_grad()
    def values(self) -> Tensor:
        """The true logits, (N, 1 + K)."""
        if self.true is None:
            dtype = compute_dtype(self.q, self.k)
            with torch.autocast(self.q.device.type, enabled=False):
                logits = contrast_logits(self.q.to(dtype), self.k.to(dtype), self._rows(), self.temperature)
            self.true = logits.to(self.dtype)
        return self.true

    def gradient(
        self,
        grad: Tensor,  # (N, 1 + K)
    ) -> Tensor:
        """The gradient to q, (N, C), from one to the true logits."""
        dtype = compute_dtype(self.q, self.k)
        q_hat, norm = normalise(self.q.to(dtype))
        k_hat, _ = normalise(self.k.to(dtype))
        grad = grad.to(dtype)
        with torch.autocast(self.q.device.type, enabled=False):
            d_hat = grad[:, :1] * k_hat + grad[:, 1:] @ self._rows().to(dtype)
        return (through_norm(d_hat, q_hat, norm) / self.temperature).to(self.q.dtype)

    def _rows(self) -> Tensor:
        self.pinned = self.pinned or self.queue()
        if self.pinned is None:
            raise RuntimeError("these logits are gone, and the queue that they were computed from with them")
        return self.pinned.restore()

    def are_labels(self, target: object) -> bool:
        """Whether a tensor is known to hold zeros without reading it: the labels, or a view of them."""
        return (
            type(target) is Tensor
            and target.dtype == self.labels.dtype
            and target.device == self.labels.device
            and not target.is_inference()  # else writes are not counted
            and target.untyped_storage().data_ptr() == self.labels.untyped_storage().data_ptr()
            and target._version == 0
        )
