"""MoCo v1 and v2, in place of the official ``moco.builder.MoCo``.

Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual
Representation Learning", algorithm 1; Chen et al. 2020, "Improved Baselines".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.models import heads
from moco_fast.norm import split_batchnorm
from moco_fast.queue import KeyQueue


class MoCo(KeyQueue):
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

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = moco_fast.MoCo(torchvision.models.resnet50, 128, 65536, 0.999, 0.2, mlp=True)
        >>> logits, labels = model(im_q=view_1, im_k=view_2)  # drop-in: logits (N, 1 + K)
        >>> loss = model.loss(view_1, view_2)  # or fused: no logits in memory
    """

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
        self.bn_splits = bn_splits
        self.head = head
        self.ema_in_step = False
        self.encoder_q = split_batchnorm(encoder_q, bn_splits) if bn_splits > 1 else encoder_q
        self.encoder_k = split_batchnorm(encoder_k, bn_splits) if bn_splits > 1 else encoder_k
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self._shuffle: torch.Generator | None = None

    def forward(
        self,
        im_q: Tensor,  # (N, ...)
        im_k: Tensor,  # (N, ...)
    ) -> tuple[Tensor, Tensor]:
        """Logits and labels, as the official model returns them.

        In training mode the key encoder is updated before its keys are
        computed, and they are enqueued at the end. In eval mode nothing changes.

        Returns:
            logits (N, 1 + K), divided by T, the positive in column 0; labels (N,) int64 zeros.

        Raises:
            ValueError: batches of different size, empty, or larger than K.
            RuntimeError: converted to SyncBatchNorm despite ``bn_splits``.
        """
        q, k, all_keys = self._encode(im_q, im_k)
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        positives = (q * k).sum(dim=1, keepdim=True)
        # A copy, because the rows are overwritten before backward needs them.
        negatives = q @ self.queue.clone().to(q.dtype)
        logits = torch.cat([positives, negatives], dim=1) / self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        if self.training:
            self.enqueue_(all_keys)
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
            RuntimeError: in a process group of several processes, where DistributedDataParallel averages
                gradients of :meth:`forward` only; or converted to SyncBatchNorm despite ``bn_splits``.
        """
        if self.training and distributed.world_size() > 1:
            raise RuntimeError(
                "MoCo.loss bypasses DistributedDataParallel, which averages the gradients of forward() only: "
                "with several processes call the wrapped model and take the cross-entropy of its logits"
            )
        q, k, all_keys = self._encode(im_q, im_k)
        result = ops.info_nce(q, k, self.negatives, self.T, return_stats=return_stats)
        if self.training:
            self.enqueue_(all_keys)
        return result

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

    def features(
        self,
        images: Tensor,  # (N, ...)
    ) -> Tensor:
        """Pooled features of the query encoder, before its head: what the pretraining is for.

        Returns:
            (N, F), without gradient. Uses the current mode: call ``eval()`` first.
        """
        captured: list[Tensor] = []
        head = self.encoder_q.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
        try:
            with torch.no_grad():
                self.encoder_q(images)
        finally:
            hook.remove()
        return captured[0]

    def _encode(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, dim) with gradient, their keys without, and the keys of all ranks to enqueue."""
        checks.momentum(self.m)  # both may have been set since the constructor, by a schedule
        checks.temperature(self.T, name="T")
        if im_q.shape[0] != im_k.shape[0]:
            raise ValueError(f"im_k must hold as many images as im_q, {im_q.shape[0]}, got {im_k.shape[0]}")
        batch = im_q.shape[0] * distributed.world_size()
        if not 1 <= batch <= self.K:
            raise ValueError(f"the batch must hold 1 to K={self.K} images, got {batch}")

        if self.bn_splits > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in self.encoder_k.modules()):
            raise RuntimeError(
                f"bn_splits={self.bn_splits} asks for statistics of parts of the batch, but the encoder was "
                "converted to SyncBatchNorm, which takes them over all of it: leave one of the two out"
            )

        q = self.encoder_q(im_q)
        if self.training and not self.ema_in_step:
            ops.ema_update_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.m)
        k, all_keys = distributed.encode_shuffled(self.encoder_k, im_k, self._permutation(batch))
        return q, k, all_keys

    def _permutation(self, batch: int) -> Tensor | None:
        """Order of the shuffled global batch, the same on every rank; None where batch norm sees it whole."""
        if not self.training:
            return None
        if distributed.world_size() == 1:
            return torch.randperm(batch) if self.bn_splits > 1 else None
        if self._shuffle is None:  # first step: agree once on a seed and an initial queue
            seed = torch.randint(2**62, (1,), device=self.queue_ptr.device)
            distributed.broadcast_(seed, self.rows, self.queue_ptr)
            self._shuffle = torch.Generator().manual_seed(int(seed))
        return torch.randperm(batch, generator=self._shuffle)
