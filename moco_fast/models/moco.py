"""MoCo v1 and v2, in place of the official ``moco.builder.MoCo``.

Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual
Representation Learning", algorithm 1; Chen et al. 2020, "Improved Baselines".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.models import heads
from moco_fast.models.method import Method
from moco_fast.norm import sees_neighbours, split_batchnorm
from moco_fast.queue import KeyQueue
from moco_fast.reference import is_channels_last


class MoCo(Method, KeyQueue):
    """Query encoder, momentum key encoder and a queue of K keys.

    Constructor, call, outputs, state dict and random numbers are the official
    ones, so scripts and checkpoints keep working; a process group is optional.
    The model *is* its queue (:class:`KeyQueue`), which puts ``queue`` and
    ``queue_ptr`` first and at the top level of the state dict.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``, query first, then key. Its head
            is ``fc``, ``head``, ``classifier`` or ``heads``.
        dim: features of the embedding.
        K: queue size; any batch up to K fits, dividing or not.
        m: momentum of the key encoder, in [0, 1].
        T: softmax temperature, above 0.
        mlp: projection MLP instead of a linear layer (v2).
        bn_splits: batch-norm statistics over this many parts of a shuffled batch, as on that many
            devices; it must divide the batch.
        queue_sync: "global", the keys of all ranks in one queue that is the same everywhere, or "local", a
            queue per rank of that rank's keys, which saves the gathering of keys.

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

    ENCODER = "encoder_q"

    # DDP would otherwise broadcast the queue, 33 MB, in every forward.
    _ddp_params_and_buffers_to_ignore = ("queue", "queue_ptr")

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
    ) -> None:
        if not callable(base_encoder):
            raise TypeError(
                f"base_encoder must be callable as base_encoder(num_classes=dim), "
                f"got {type(base_encoder).__name__}"
            )
        checks.count("dim", dim)
        checks.count("K", K)
        checks.momentum(m)
        checks.temperature(T, name="T")
        checks.count("bn_splits", bn_splits)
        checks.one_of("queue_sync", queue_sync, ("global", "local"))

        # Drawn in the official order (query, key, MLPs, queue): one seed, one initial state.
        encoder_q = base_encoder(num_classes=dim)
        encoder_k = base_encoder(num_classes=dim)
        head = heads.head_path(encoder_q)
        width = encoder_q.get_submodule(head).out_features
        if width != dim:
            raise ValueError(
                f"base_encoder(num_classes={dim}) must return {dim} features, its head has {width}"
            )
        if mlp:
            heads.insert_mlp(encoder_q, head)
            heads.insert_mlp(encoder_k, head)
        super().__init__(dim, K)

        self.K, self.m, self.T = K, m, T
        self.bn_splits, self.queue_sync = bn_splits, queue_sync
        self._part = 0  # of the forward passes of a step
        self._waiting: list[Tensor] = []  # keys of the parts so far
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
            logits (N, 1 + K), divided by T, the positive in column 0; labels (N,) int64 zeros.

        Raises:
            ValueError: batches of different size, empty, or larger than K; return_stats without return_loss.
            Disagreement: on every rank, if ranks were given different batches or options.
            RuntimeError: converted to SyncBatchNorm despite ``bn_splits``.
        """
        q, k, enqueue = self._encode(im_q, im_k, stats_alone=return_stats and not return_loss)
        if return_loss:
            result = ops.info_nce(q, k, self.negatives, self.T, return_stats=return_stats)
            enqueue()
            return result
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        positives = (q * k).sum(dim=1, keepdim=True)
        # A copy, because the rows are overwritten before backward needs them.
        negatives = q @ self.queue.clone().to(q.dtype)
        logits = torch.cat([positives, negatives], dim=1) / self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        enqueue()
        return logits, labels

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
        waiting, self._waiting, self._part = self._waiting, [], 0
        if waiting:
            self.enqueue_(torch.cat(waiting))

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step. Setting it ends a step that has begun, see :meth:`end_step`."""
        return self._accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, count: int) -> None:
        self.end_step()
        self._accumulation_steps = count

    def _encode(
        self, im_q: Tensor, im_k: Tensor, stats_alone: bool
    ) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """Queries (N, dim) with gradient, their keys without, and what enqueues the keys of all ranks."""
        problem: Exception | None = None
        facts: dict[str, object] = {}
        shuffles = False
        try:
            self._check(im_q, im_k, stats_alone)
            # Among other neighbours than their queries, unless one device sees all of them.
            shuffles = distributed.world_size() * self.bn_splits > 1 and sees_neighbours(self.encoder_k)
            facts = self._facts(im_q, im_k, shuffles)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = error
        if not self.training:
            if problem is not None:
                raise problem
            with torch.no_grad():
                k = self.encoder_k(im_k)
            return self.encoder_q(im_q), k, lambda: None

        distributed.check_agreement(facts, problem)
        if self.shuffle.generator is None:  # the first step: agree once on a seed and an initial queue
            self.shuffle.agree(self.queue_ptr.device)
            if self.queue_sync == "global":
                distributed.broadcast_(self.rows, self.queue_ptr)
                self._forget_mirror()
        exchange = None
        if shuffles:
            plan = self.shuffle.plan(len(im_k), self.bn_splits, im_k.device)
            exchange = distributed.Exchange(im_k, plan)  # travels while the queries are encoded
        if self._part == 0 and not self.ema_in_step:
            self._update_key_encoder()
        q = self.encoder_q(im_q)
        with torch.no_grad():
            k, all_keys, order = self._keys(im_k, exchange)
        return q, k, partial(self._enqueue_part, all_keys, order)

    def _check(self, im_q: Tensor, im_k: Tensor, stats_alone: bool) -> None:
        """Raise for what is wrong with a step, before anything is changed."""
        if stats_alone:
            raise ValueError("return_stats must be left out without return_loss=True, got True")
        checks.momentum(self.m)  # these may have been set since the constructor, by a schedule
        checks.temperature(self.T, name="T")
        checks.count("accumulation_steps", self.accumulation_steps)
        for name, images in (("im_q", im_q), ("im_k", im_k)):
            if not isinstance(images, Tensor) or images.ndim == 0:
                shown = (
                    f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
                )
                raise TypeError(f"{name} must be a tensor of images (N, ...), got {shown}")
        if im_q.shape[0] != im_k.shape[0]:
            raise ValueError(f"im_k must hold as many images as im_q, {im_q.shape[0]}, got {im_k.shape[0]}")
        enqueued = im_q.shape[0]
        if self.training:
            enqueued *= self.accumulation_steps
            enqueued *= distributed.world_size() if self.queue_sync == "global" else 1
        if not 1 <= enqueued <= (self.K if self.training else enqueued):
            raise ValueError(f"the batch must hold 1 to K={self.K} images, got {enqueued}")
        if not self.training:
            return
        if (
            hasattr(self, "unshard")
            and not self.ema_in_step
            and not all(hasattr(p, "to_local") for p in self.parameters())
        ):  # of FSDP2, which has gathered the parameters by now and drops what is written to them
            raise RuntimeError(
                "fully_shard(model) needs fully_shard(model.encoder_q) and fully_shard(model.encoder_k) "
                "before it, so that the key encoder's shards can be updated"
            )
        if im_q.shape[0] % self.bn_splits:
            raise ValueError(f"bn_splits={self.bn_splits} must divide the batch, got {im_q.shape[0]} samples")
        if self.bn_splits > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in self.encoder_k.modules()):
            raise RuntimeError(
                f"bn_splits={self.bn_splits} asks for statistics of parts of the batch, but the encoder was "
                "converted to SyncBatchNorm, which takes them over all of it: leave one of the two out"
            )

    def _facts(self, im_q: Tensor, im_k: Tensor, shuffles: bool) -> dict[str, object]:
        """What has to be the same on every rank for the next step to be one step."""
        if distributed.world_size() == 1:
            return {}
        if self._parameter_digest is None:
            state = [*self.named_parameters(), *self.named_buffers()]
            described = [(name, tuple(x.shape), x.dtype) for name, x in state if name != "queue"]
            self._parameter_digest = hashlib.blake2b(repr(described).encode(), digest_size=8).hexdigest()
        kind = im_k.device.type
        return {
            "im_q": tuple(im_q.shape),
            # Rows travel as they lie in memory.
            "im_k": (tuple(im_k.shape), im_k.dtype, "NHWC" if is_channels_last(im_k) else "NCHW"),
            "K": self.K,
            "dim": self.rows.shape[1],
            "T": self.T,
            "m": self.m,
            "bn_splits": self.bn_splits,
            "queue_sync": self.queue_sync,
            "accumulation_steps": (self._part, self.accumulation_steps),
            "MOCO_FAST_SHUFFLE": (distributed.scheme(), shuffles),
            "the state of the shuffle": self.shuffle.digest(),
            "ema_in_step": self.ema_in_step,
            "autocast": torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            "the encoders' parameters and buffers (names, shapes, dtypes)": self._parameter_digest,
        }

    def _update_key_encoder(self) -> None:
        keys, queries = ([*encoder.parameters()] for encoder in (self.encoder_k, self.encoder_q))
        ops.ema_update_(distributed.local_shards(keys), distributed.local_shards(queries), self.m)
        unshard: Any = getattr(self.encoder_k, "unshard", None)
        if unshard is not None:  # else FSDP2 gathers on a stream that has not waited for this
            unshard()

    def _keys(
        self, im_k: Tensor, exchange: distributed.Exchange | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's keys (N, dim); and those to enqueue, with the order to write them in."""
        if exchange is None:
            k = self.encoder_k(im_k)
            return k, distributed.all_gather_rows(k) if self.queue_sync == "global" else k, None
        shuffled = self.encoder_k(exchange.images())
        if self.queue_sync == "global":
            k, gathered = exchange.keys_of_all(shuffled)
            return k, gathered, exchange.plan.home
        k = exchange.keys_back(shuffled)
        return k, k, None

    def _enqueue_part(self, keys: Tensor, order: Tensor | None) -> None:
        """Enqueue the keys of a step; those of its earlier parts wait for the last."""
        if self.accumulation_steps == 1:
            self.enqueue_(keys, order)
            return
        self._waiting.append(keys if order is None else ops.take_rows(keys, order))
        self._part += 1
        if self._part == self.accumulation_steps:
            self.end_step()
