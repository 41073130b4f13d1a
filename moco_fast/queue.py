"""The queue of negative keys, a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, ops


class KeyQueue(nn.Module):
    """Ring buffer of K unit-norm keys, with the buffers of the official checkpoints.

    The buffer ``queue`` has shape (dim, K), as saved by existing code, over storage
    in which every key is contiguous: :attr:`rows` is the (K, dim) view that the
    ops read, free of charge. The strides survive ``.to()``, copying, saving and
    loading (not ``load_state_dict(assign=True)``, which costs a copy per step).

    Args:
        dim: features per key.
        K: number of slots.

    Raises:
        ValueError: dim or K below 1.

    Example:
        >>> negatives = moco_fast.KeyQueue(128, 65536)
        >>> loss = moco_fast.info_nce(q, k, negatives.rows)
        >>> negatives.enqueue_(k)
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, K: int = 65536) -> None:
        super().__init__()
        checks.count("dim", dim)
        checks.count("K", K)
        # Drawn as (dim, K) and normalised over dim 0: one seed gives the official initial queue.
        columns = F.normalize(torch.randn(dim, K), dim=0)
        self.register_buffer("queue", columns.t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def rows(self) -> Tensor:
        """The keys as rows, (K, dim): a view of the buffer."""
        return self.queue.t()

    def enqueue_(
        self,
        keys: Tensor,  # (N, dim), raw, N <= K
    ) -> None:
        """Replace the oldest keys; see :func:`moco_fast.enqueue_`."""
        ops.enqueue_(self.rows, self.queue_ptr, keys)
