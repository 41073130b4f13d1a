"""``moco.builder`` of the official repositories: MoCo of v1 and v2, MoCo_ResNet and MoCo_ViT of v3."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from moco_fast import ops
from moco_fast.compat.logits import fused_logits
from moco_fast.compat.source import QueueSnapshot
from moco_fast.distributed import all_gather_rows as concat_all_gather
from moco_fast.models import moco
from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT

__all__ = ["MoCo", "MoCo_ResNet", "MoCo_ViT", "concat_all_gather"]


class MoCo(moco.MoCo):
    """:class:`moco_fast.MoCo`, whose logits take no memory.

    ``model(im_q, im_k)`` returns logits (N, 1 + K) and labels (N,), int64 zeros.
    ``F.cross_entropy(logits, labels)`` is then the fused loss, and ``logits.topk`` has the fused ranks; any
    other operation on them computes the true logits, once, and the first in a process says so
    (:class:`moco_fast.compat.logits.Logits`).

    Arguments, state dict and everything else are those of :class:`moco_fast.MoCo`.

    Example:
        >>> from moco_fast.compat import builder as moco_builder  # was: import moco.builder
        >>> model = moco_builder.MoCo(torchvision.models.resnet50, 128, 65536, 0.999, 0.2, True)
        >>> output, target = model(im_q=images[0], im_k=images[1])
        >>> loss = torch.nn.CrossEntropyLoss()(output, target)
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._snapshots: WeakSet[QueueSnapshot] = WeakSet()  # of logits that may still be asked for

    # Tensors without storage are nothing that a graph could hold. The encoders are compiled all the same.
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        im_q: Tensor,  # (N, ...)
        im_k: Tensor,  # (N, ...)
        *,
        return_loss: bool = False,
        return_stats: bool = False,
    ) -> Any:
        """Logits and labels as in the class; everything else as in :meth:`moco_fast.MoCo.forward`."""
        if return_loss:
            return super().forward(im_q, im_k, return_loss=True, return_stats=return_stats)
        q, k, enqueue = self._encode(im_q, im_k, False, return_stats)
        loss, stats = ops.info_nce(q, k, self.negatives, self.T, reduction="none", return_stats=True)
        rank = stats.rank.masked_fill(loss.isnan(), len(self.rows))  # no comparison with a NaN holds
        snapshot = QueueSnapshot(self.rows)
        self._snapshots.add(snapshot)
        result = fused_logits(loss, rank, q, k, snapshot, self.T)
        enqueue()
        return result

    @torch.compiler.disable
    def enqueue_(
        self,
        keys: Tensor,  # (N, dim), raw, N <= K
        order: Tensor | None = None,  # (N,) int64
    ) -> None:
        """Replace the oldest keys, saved for logits in use; see :meth:`moco_fast.KeyQueue.enqueue_`."""
        if self._snapshots:
            slots = (self.queue_ptr + torch.arange(keys.shape[0], device=keys.device)) % len(self.rows)
            overwritten = slots, self.rows[slots]
            for snapshot in self._snapshots:
                snapshot.save(*overwritten)
        before = self.queue._version
        super().enqueue_(keys, order)
        for snapshot in self._snapshots:
            snapshot.version += self.queue._version - before

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        del state["_snapshots"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._snapshots = WeakSet()  # a copy has given away no logits
