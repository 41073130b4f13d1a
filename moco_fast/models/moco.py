"""MoCo v1 and v2, in place of the official ``moco.builder.MoCo``.

Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual
Representation Learning", algorithm 1; Chen et al. 2020, "Improved Baselines".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.models import heads, moco_checks, steps
from moco_fast.models.method import Method, not_broadcast
from moco_fast.norm import sees_neighbours, split_batchnorm
from moco_fast.queue import KeyQueue


class Keys(NamedTuple):
    """What a part of a step has to enqueue, of one direction."""

    rows: Tensor  # (M, dim)
    order: Tensor | None  # (M,) order to write them in, None: as they are
    labels: Tensor | None = None  # (M,) int64, as they are written; of SupMoCo


class MoCo(Method, KeyQueue):
    """Query encoder, momentum key encoder and a queue of K keys.

    Constructor, call, outputs, state dict and random numbers are the official
    ones, so scripts and checkpoints keep working; a process group is optional.
    The model *is* its queue (:class:`KeyQueue`), which puts ``queue`` and
    ``queue_ptr`` first and at the top level of the state dict.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``, query first, then key. Its head
            is ``fc``, ``head``, ``classifier`` or ``heads``; only ``mlp`` and :meth:`features` need one.
        dim: features of the embedding.
        K: queue size; any batch up to K fits, dividing or not.
        m: momentum of the key encoder, in [0, 1].
        T: softmax temperature, above 0.
        mlp: projection MLP instead of a linear layer (v2).
        bn_splits: batch-norm statistics over this many parts of a shuffled batch, as on that many
            devices; it must divide the batch.
        queue_sync: "global", the keys of all ranks in one queue that is the same everywhere, or "local", a
            queue per rank of that rank's keys, which saves the gathering of keys.
        symmetric: both views are queries in turn, against the other view's keys and one queue. The loss is
            the sum of both directions, as in the official CIFAR notebook, and the keys of both views are
            enqueued, 2N a step. Fused loss only, whose statistics are those of 2N queries.
        shuffle_bn: shuffle the batch of the keys where batch norm sees parts of it. Without, a key shares its
            statistics with its query alone, which gives the positive away (He et al. 2020, section 3.3).

    Attributes:
        accumulation_steps: forward passes per optimizer step, 1 unless set. The key encoder is updated before
            the first of them, and all their keys are enqueued after the last.
        shuffle: draws the batch shuffle; a checkpoint from which losses shall repeat holds its ``state()``.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = moco_fast.MoCo(torchvision.models.resnet50, 128, 65536, 0.999, 0.2, mlp=True)
        >>> logits, labels = model(im_q=view_1, im_k=view_2)  # drop-in: logits (N, 1 + K)
        >>> loss = model.loss(view_1, view_2)  # or fused: no logits in memory
    """

    # DDP would otherwise broadcast the queue, 33 MB, in every forward.
    _ddp_params_and_buffers_to_ignore = not_broadcast("queue", "queue_ptr")
    UNCALLED: ClassVar[Mapping[str, str]] = {
        "_dequeue_and_enqueue": "override enqueue_(keys, order), which is given the keys of all ranks",
        "_batch_shuffle_ddp": "no process group is needed; shuffle_bn=False leaves the shuffle out",
        "_batch_unshuffle_ddp": "no process group is needed; shuffle_bn=False leaves the shuffle out",
        "_build_projector_and_predictor_mlps": "MoCo v3 is MoCo_ResNet and MoCo_ViT",
    }

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        bn_splits: int = 1,
        queue_sync: str = "global",
        symmetric: bool = False,
        shuffle_bn: bool = True,
    ) -> None:
        K, m, T = checks.count("K", K), checks.fraction("m", m), checks.temperature("T", T)
        bn_splits = checks.count("bn_splits", bn_splits)
        checks.one_of("queue_sync", queue_sync, ("global", "local"))

        # Drawn in the official order (query, key, MLPs, queue): one seed, one initial state.
        encoder_q, head = steps.build_encoder(base_encoder, dim, needs_head=mlp)
        encoder_k, _ = steps.build_encoder(base_encoder, dim, needs_head=mlp)
        if mlp:
            heads.insert_mlp(encoder_q, head)
            heads.insert_mlp(encoder_k, head)
        super().__init__(dim, K)

        self.K, self.m, self.T = K, m, T
        self.bn_splits, self.queue_sync, self.symmetric = bn_splits, queue_sync, symmetric
        self.shuffle_bn = shuffle_bn
        self._waiting: list[list[Keys]] = []  # what the parts of a step have to enqueue, by direction
        self._accumulation_steps = 1
        self.head = head
        self.ema_in_step = False
        self.encoder_q = split_batchnorm(encoder_q, bn_splits) if bn_splits > 1 else encoder_q
        self.encoder_k = split_batchnorm(encoder_k, bn_splits) if bn_splits > 1 else encoder_k
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.shuffle = distributed.BatchShuffle()
        self._parameter_digest: str | None = None

    @property
    def encoder(self) -> nn.Module:
        """The submodule that is pretrained and kept."""
        return self.encoder_q

    def forward(
        self,
        im_q: Tensor,  # (N, ...)
        im_k: Tensor,  # (N, ...)
        *,
        return_loss: bool = False,
        return_stats: bool = False,
    ) -> Any:
        """Logits and labels, as the official model returns them; or the fused loss.

        In training mode the key encoder is updated before its keys are
        computed, and they are enqueued at the end. In eval mode nothing changes, and nothing is exchanged
        between ranks.

        Args:
            im_q: views for the query encoder.
            im_k: views for the key encoder.
            return_loss: return what :meth:`loss` returns. A call of the model, unlike one of a method, goes
                through the wrappers of DistributedDataParallel and FSDP.
            return_stats: with ``return_loss``, see :meth:`loss`.

        Returns:
            the loss; or logits (N, 1 + K), divided by T, the positive in column 0; labels (N,) int64 zeros.

        Raises:
            ValueError: batches of different size, empty, or larger than K; return_stats or a symmetric model
                without return_loss.
            Disagreement: on every rank, if ranks were given different batches or options.
            RuntimeError: converted to SyncBatchNorm despite ``bn_splits``.
        """
        q, k, enqueue = self._encode(im_q, im_k, return_loss, return_stats)
        if return_loss:
            stats = None
            if return_stats:
                loss, stats = ops.info_nce(q, k, self.negatives, self.T, return_stats=True)
            else:
                loss = ops.info_nce(q, k, self.negatives, self.T)
            enqueue()
            if self.symmetric:
                loss = 2 * loss  # from the mean over the rows of both directions to the sum of their means
            return loss if stats is None else (loss, stats)
        # A copy, because the rows are overwritten before backward needs them.
        logits = contrast_logits(q, k, self.rows.clone(), self.T)
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        enqueue()
        return logits, labels

    @overload
    def loss(self, im_q: Tensor, im_k: Tensor, *, return_stats: Literal[False] = ...) -> Tensor: ...

    @overload
    def loss(
        self, im_q: Tensor, im_k: Tensor, *, return_stats: Literal[True]
    ) -> tuple[Tensor, ops.InfoNCEStats]: ...

    def loss(
        self,
        im_q: Tensor,  # (N, ...)
        im_k: Tensor,  # (N, ...)
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ops.InfoNCEStats]:
        """The mean InfoNCE loss, fused: what cross-entropy of :meth:`forward` gives, without logits.

        Args:
            im_q: views for the query encoder.
            im_k: views for the key encoder.
            return_stats: also return rank and similarities, see :class:`moco_fast.ops.InfoNCEStats`.

        Raises:
            ValueError: batches of different size, empty, or larger than K.
            RuntimeError: in training in a process group of several processes, whose gradients only a call of
                the wrapped model averages; or converted to SyncBatchNorm despite ``bn_splits``.
        """
        if self.training and distributed.world_size() > 1:
            raise RuntimeError(
                "MoCo.loss bypasses DistributedDataParallel, which averages gradients of calls of the model: "
                "with several processes call the wrapped model, ddp(im_q, im_k, return_loss=True)"
            )
        return self(im_q, im_k, return_loss=True, return_stats=return_stats)

    def verify_queue(self) -> None:
        """Raise the same error on every rank unless all hold the same queue and pointer; called by all.

        With ``queue_sync="local"`` only the pointers have to be equal.

        Raises:
            Disagreement: names the ranks that differ from rank 0.
        """
        value = self.checksum() if self.queue_sync == "global" else self.queue_ptr[0]
        distributed.check_equal("the queue", value)

    def move_ema_into_step(self) -> list[tuple[Tensor, Tensor]]:
        """Leave the key encoder's update to the optimizer, fused into its step.

        Sets :attr:`ema_in_step`, after which the forward pass no longer updates the key encoder. The
        optimizer does it right after the query encoder's update instead of right before the next use,
        which is the same: the first update, which this leaves out, averages two equal encoders. A checkpoint
        then holds keys that have made the update which the next forward pass would have made, and a step
        that a GradScaler skips updates no keys.

        Returns:
            (key, query) pairs of parameters: the argument ``ema`` of the optimizers in
            :mod:`moco_fast.optim`. Their ``m``, not that of the model, is the momentum then.

        Example:
            >>> pairs = model.move_ema_into_step()
            >>> optimizer = moco_fast.SGD(model.parameters(), lr=0.03, momentum=0.9, ema=pairs, m=model.m)
        """
        self.ema_in_step = True
        return list(zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True))

    def end_step(self) -> None:
        """Enqueue what waits for the last of ``accumulation_steps`` parts, where a step ends before it."""
        waiting, self._waiting = self._waiting, []
        # The second direction's keys, those of the first view, are the first to be enqueued.
        for parts in reversed(list(zip(*waiting, strict=True))):
            self._enqueue_step(_in_one(parts))

    def _enqueue_step(self, keys: Keys) -> None:
        self.enqueue_(keys.rows, keys.order)

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step. Setting it ends a step that has begun, see :meth:`end_step`."""
        return self._accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, count: int) -> None:
        self.end_step()
        self._accumulation_steps = count

    def _encode(
        self,
        im_q: Tensor,
        im_k: Tensor,
        return_loss: bool,
        return_stats: bool,
        further: Callable[[], dict[str, object]] = dict,  # checks and facts of a subclass
    ) -> tuple[Tensor, Tensor, Callable[..., None]]:
        """Queries (N, dim) with gradient, their keys without, and what enqueues the keys of all ranks,
        in training with labels if they are given.

        A symmetric model's are (2N, dim): im_q against im_k, then im_k against im_q.
        """
        # Among other neighbours than their queries, unless one device sees all of them.
        parts = distributed.world_size() * self.bn_splits
        shuffles = self.shuffle_bn and parts > 1 and sees_neighbours(self.encoder_k)
        steps.agree(
            self,
            lambda: moco_checks.step(self, im_q, im_k, return_loss, return_stats, shuffles) | further(),
            getattr(im_k, "device", None),
        )
        directions = [(im_q, im_k), (im_k, im_q)][: 2 if self.symmetric else 1]
        if not self.training:
            with torch.no_grad():
                k = _joined([self.encoder_k(images) for _, images in directions])
            return _joined([self.encoder_q(images) for images, _ in directions]), k, lambda: None

        self._begin()
        # Images travel while the queries are encoded.
        exchanges = [self._exchange(images) if shuffles else None for _, images in directions]
        if not self._waiting:
            self._momentum_update_key_encoder()
        q = _joined([self.encoder_q(images) for images, _ in directions])
        with torch.no_grad():
            keys = [self._keys(images, way) for (_, images), way in zip(directions, exchanges, strict=True)]
        return q, _joined([own for own, _ in keys]), partial(self._end_part, [every for _, every in keys])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._waiting = []  # keys of the state that is gone

    def _begin(self) -> None:
        """In the first step: agree once on a seed and an initial queue."""
        if self.shuffle.generator is None:
            self.shuffle.agree(self.queue_ptr.device)
            if self.queue_sync == "global":
                distributed.broadcast_(*self._shared_state())
                self._outdate_mirror()

    def _shared_state(self) -> list[Tensor]:
        """What ranks with one queue have to hold alike."""
        return [self.rows, self.queue_ptr]

    def _exchange(self, images: Tensor) -> distributed.Exchange:
        return distributed.Exchange(images, self.shuffle.plan(len(images), self.bn_splits, images.device))

    def _keys(self, images: Tensor, exchange: distributed.Exchange | None) -> tuple[Tensor, Keys]:
        """This rank's keys (N, dim); and those to enqueue, with the order to write them in."""
        if exchange is None:
            k = self.encoder_k(images)
            return k, Keys(distributed.all_gather_rows(k) if self.queue_sync == "global" else k, None)
        shuffled = self.encoder_k(exchange.images())
        if self.queue_sync == "global":
            k, gathered = exchange.keys_of_all(shuffled)
            return k, Keys(gathered, exchange.plan.home)
        k = exchange.keys_back(shuffled)
        return k, Keys(k, None)

    def _end_part(
        self,
        keys: list[Keys],
        labels: Tensor | None = None,  # of the images whose keys they are
    ) -> None:
        """Enqueue the keys of a step; those of its earlier parts wait for the last."""
        self._waiting.append([Keys(part.rows, part.order, labels) for part in keys])
        if len(self._waiting) == self.accumulation_steps:
            self.end_step()

    # The official class's, for subclasses with a forward of their own. Ours calls the first of them alone.

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """``encoder_k <- m * encoder_k + (1 - m) * encoder_q``, unless the optimizer does it; no buffers."""
        if self.ema_in_step:
            return
        steps.check_shards(self, "encoder_k", "encoder_q")
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        steps.follow_(self.encoder_k, pairs, self.m)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Enqueue this rank's keys (N, dim) and, unless ``queue_sync`` is "local", those of all others."""
        self._begin()
        self.enqueue_(distributed.all_gather_rows(keys) if self.queue_sync == "global" else keys)

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, distributed.Exchange]:
        """The images (N, ...) that this rank gets for its own; and what brings their keys back."""
        moco_checks.encoders(self, len(x))
        self._begin()
        exchange = self._exchange(x)
        return exchange.images(), exchange

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: distributed.Exchange) -> Tensor:
        """The keys (N, dim) of this rank's own images, for those of the images that it got."""
        return idx_unshuffle.keys_back(x)


def _in_one(parts: Sequence[Keys]) -> Keys:
    """The keys of all parts of a step, one after the other."""
    if len(parts) == 1:
        return parts[0]
    rows = torch.cat([k.rows if k.order is None else ops.take_rows(k.rows, k.order) for k in parts])
    labels = [k.labels for k in parts if k.labels is not None]
    return Keys(rows, None, torch.cat(labels) if labels else None)


def contrast_logits(
    q: Tensor,  # (N, C), raw
    k: Tensor,  # (N, C), raw
    rows: Tensor,  # (K, C), of unit norm
    temperature: float,
) -> Tensor:
    """``cat([q^.k^, q^ @ rows^T]) / T``, (N, 1 + K): the positive in column 0."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positives = (q * k).sum(dim=1, keepdim=True)
    return torch.cat([positives, q @ rows.to(q.dtype).t()], dim=1) / temperature


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)
