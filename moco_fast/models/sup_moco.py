"""MoCo with labels: the rows of the queue that have a query's label are its positives too.

Source: He et al. 2020, "Momentum Contrast", with the loss of Khosla et al.
2020, "Supervised Contrastive Learning", equation 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco_fast import checks, distributed, ops
from moco_fast.models.method import not_broadcast
from moco_fast.models.moco import Keys, MoCo


class SupMoCo(MoCo):
    """A :class:`moco_fast.MoCo` whose queue knows the labels of its keys.

    Args:
        base_encoder, dim, K, m, T, mlp, options: those of MoCo.
        classes: how many there are; labels are in [-1, classes), -1 for an image whose label is unknown.

    Attributes:
        queue_labels: (K,) int64, in the state dict beside the queue; -1 of the random keys it starts with.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = SupMoCo(torchvision.models.resnet50, 128, 65536, classes=1000)
        >>> loss = model(view_1, view_2, labels)
    """

    queue_labels: Tensor

    _ddp_params_and_buffers_to_ignore = (
        *MoCo._ddp_params_and_buffers_to_ignore,
        *not_broadcast("queue_labels"),
    )

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        classes: int,
        **options: Any,
    ) -> None:
        super().__init__(base_encoder, dim, K, m, T, mlp, **options)
        self.classes = checks.count("classes", classes)
        self.register_buffer("queue_labels", torch.full((K,), -1))

    def forward(  # type: ignore[override]  # labels are what makes it another model
        self,
        im_q: Tensor,  # (N, ...)
        im_k: Tensor,  # (N, ...)
        labels: Tensor,  # (N,) int64
        *,
        return_stats: bool = False,
    ) -> Any:
        """The fused loss with several positives; a step in all else that of MoCo.

        Args:
            im_q: views for the query encoder.
            im_k: views for the key encoder.
            labels: class of every image.
            return_stats: also return :class:`moco_fast.ops.InfoNCEStats`, of the image's own key and all rows
                of the queue; a second pass over the queue.

        Returns:
            The mean loss, of a symmetric model the sum of both directions'; with ``return_stats`` also the
            statistics, a row for each query.

        Raises:
            TypeError, ValueError: as of MoCo; labels not int64, not one for each image, or, on a CPU, out of
                range.
            Disagreement: on every rank, if ranks were given different things.
        """
        q, k, enqueue = self._encode(
            im_q, im_k, return_loss=True, return_stats=return_stats,
            further=lambda: self._label_facts(im_q, labels),
        )  # fmt: skip
        directions = 2 if self.symmetric else 1
        loss = directions * ops.multi_info_nce(
            q, k, self.negatives, self.T,
            labels=labels.repeat(directions), queue_labels=self.queue_labels, classes=self.classes,
        )  # fmt: skip
        stats = None
        if return_stats:
            _, stats = ops.info_nce(q.detach(), k, self.negatives, self.T, return_stats=True)
        if self.training:
            enqueue(distributed.all_gather_rows(labels) if self.queue_sync == "global" else labels)
        return loss if stats is None else (loss, stats)

    def loss(self, *arguments: Any, **options: Any) -> Any:
        """MoCo's, which has no labels; call the model instead.

        Raises:
            TypeError: always.
        """
        raise TypeError("SupMoCo has no loss without labels: call the model, model(im_q, im_k, labels)")

    def enqueue_(
        self,
        keys: Tensor,  # (N, dim), raw, N <= K
        order: Tensor | None = None,  # (N,) int64
        labels: Tensor | None = None,  # (N,) int64, in the order in which keys are written
    ) -> None:
        """Replace the oldest keys and their labels; without labels they have none."""
        labels = self.queue_labels.new_full((len(keys),), -1) if labels is None else labels
        slots = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        super().enqueue_(keys, order)
        self.queue_labels.index_copy_(0, slots, labels)

    def _enqueue_step(self, keys: Keys) -> None:
        self.enqueue_(*keys)

    def checksum(self) -> Tensor:
        """That of the queue and of its labels."""
        places = 2 * torch.arange(self.K, device=self.queue_labels.device) + 1
        return super().checksum() + ((self.queue_labels + 2) * places).sum()

    def _shared_state(self) -> list[Tensor]:
        return [*super()._shared_state(), self.queue_labels]

    def _label_facts(self, im_q: Tensor, labels: Tensor) -> dict[str, object]:
        checks.in_range("labels", checks.per_row("labels", labels, "im_q", im_q), self.classes, start=-1)
        return {"classes": self.classes, "labels": tuple(labels.shape)}
