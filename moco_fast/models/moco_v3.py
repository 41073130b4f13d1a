"""MoCo v3, in place of the official ``MoCo_ResNet`` and ``MoCo_ViT``.

Source: Chen, Xie, He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", algorithm 1
and section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moco_fast import checks, distributed, ops
from moco_fast.models import heads, steps
from moco_fast.models.method import Method


def momentum_at(progress: float, m0: float) -> float:
    """Momentum of the keys after a share of the training: ``1 - (1 + cos(pi * progress)) (1 - m0) / 2``.

    Rises from ``m0`` to 1 along half a cosine. Source: section 4.1 of the paper.

    Args:
        progress: epochs done over all epochs, parts of an epoch included, in [0, 1].
        m0: momentum at the start, in [0, 1].

    Raises:
        TypeError, ValueError: an argument out of range, named.
    """
    checks.fraction("progress", progress)
    checks.fraction("m0", m0)
    return 1 - (1 + math.cos(math.pi * progress)) * (1 - m0) / 2


class MoCoV3(Method):
    """Two views against each other's keys within the batch, of all ranks; no queue.

    With q = predictor(base_encoder(x)), k = momentum_encoder(x) and y the key of query i::

        loss = 2 T (CE(q1^ k2^' / T, y) + CE(q2^ k1^' / T, y))

    Constructor, call, and the names and order of the state dict are the official ones, so scripts and
    checkpoints keep working; a process group is optional. The momentum encoder follows by its parameters
    alone: statistics of its batch norms are its own.

    Use :class:`MoCo_ResNet` or :class:`MoCo_ViT`, which differ in their MLPs.

    Args:
        base_encoder: called as ``base_encoder(num_classes=mlp_dim)``, base first, then momentum encoder.
            Its head is ``fc``, ``head``, ``classifier`` or ``heads``, where the projector replaces it.
        dim: features of the embedding.
        mlp_dim: features of the hidden layers of projector and predictor.
        T: softmax temperature, above 0.

    Attributes:
        PROJECTOR_LAYERS, PREDICTOR_NORM: depth of the projector, and whether the predictor ends with a norm.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = MoCo_ResNet(torchvision.models.resnet50, 256, 4096, 1.0)
        >>> loss = model(view_1, view_2, momentum_at(step / steps, 0.99))
    """

    PROJECTOR_LAYERS: ClassVar[int]
    PREDICTOR_NORM: ClassVar[bool]
    UNCALLED: ClassVar[Mapping[str, str]] = {
        "_build_projector_and_predictor_mlps": "set PROJECTOR_LAYERS and PREDICTOR_NORM, or replace modules "
        "after the constructor",
        "contrastive_loss": "both directions are one op; override forward",
    }

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 256,
        mlp_dim: int = 4096,
        T: float = 1.0,
    ) -> None:
        super().__init__()
        self.T = checks.temperature("T", T)
        self.dim = checks.count("dim", dim)
        # One seed, one initial state: drawn encoder by encoder, then the MLPs in the same order. The head is
        # of mlp_dim outputs for that alone.
        self.base_encoder, self.head = steps.build_encoder(base_encoder, mlp_dim, name="mlp_dim")
        self.momentum_encoder, _ = steps.build_encoder(base_encoder, mlp_dim, name="mlp_dim")
        linear = self.base_encoder.get_submodule(self.head)
        assert isinstance(linear, nn.Linear)
        hidden = [mlp_dim] * (self.PROJECTOR_LAYERS - 1)
        for encoder in (self.base_encoder, self.momentum_encoder):
            heads.replace(encoder, self.head, heads.mlp([linear.in_features, *hidden, dim], last_norm=True))
        self.predictor = heads.mlp([dim, mlp_dim, dim], last_norm=self.PREDICTOR_NORM)
        for base, momentum in zip(
            self.base_encoder.parameters(), self.momentum_encoder.parameters(), strict=True
        ):
            momentum.data.copy_(base.data)
            momentum.requires_grad = False

    @property
    def encoder(self) -> nn.Module:
        """The submodule that is pretrained and kept."""
        return self.base_encoder

    def forward(
        self,
        x1: Tensor,  # (N, ...)
        x2: Tensor,  # (N, ...)
        m: float | Tensor,
        *,
        return_stats: bool = False,
    ) -> Any:
        """The loss of both directions, as in the class.

        In training mode the momentum encoder is updated before it computes keys, and the keys of all ranks
        are gathered once. In eval mode nothing changes, and a rank contrasts its own keys alone.

        Args:
            x1: one view of every image.
            x2: the other.
            m: momentum of the momentum encoder, in [0, 1]; a 0-d tensor on its device is not read back.
                :func:`momentum_at` gives the schedule.
            return_stats: also return means over the queries of both directions.

        Returns:
            The loss, a scalar; with ``return_stats`` also a dict of the means that
            :meth:`moco_fast.ops.InfoNCEStats.means` names.

        Raises:
            TypeError, ValueError: views that are no tensors, of different or no images; m or T out of range.
            Disagreement: on every rank, if ranks were given different batches or options.
            RuntimeError: sharded by FSDP2 as a whole, without its encoders.
        """
        steps.agree(self, lambda: self._facts(x1, x2, m), getattr(x1, "device", None))
        if self.training:
            self._update_momentum_encoder(m)
        q = torch.stack([self.predictor(self.base_encoder(x)) for x in (x1, x2)])
        with torch.no_grad():
            k1, k2 = (self.momentum_encoder(x) for x in (x1, x2))
            k, first = self._all_keys(torch.stack([k2, k1]).to(q.dtype))
        loss = 4 * self.T * ops.contrast(q, k, self.T, first=first)  # the mean of two directions, times 2
        if not return_stats:
            return loss
        own = first + torch.arange(q.shape[1], device=q.device)
        stats = [steps.pair_stats(queries, keys, own) for queries, keys in zip(q.detach(), k, strict=True)]
        return loss, {name: (stats[0][name] + stats[1][name]) / 2 for name in stats[0]}

    def _update_momentum_encoder(self, m: float | Tensor) -> None:
        both = list(zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True))
        trained = [pair for pair in both if pair[1].requires_grad]
        frozen = [pair for pair in both if not pair[1].requires_grad]  # as position embeddings
        steps.follow_(self.momentum_encoder, trained, m, frozen)

    def _all_keys(
        self,
        k: Tensor,  # (2, N, dim)
    ) -> tuple[Tensor, int]:
        """The keys of all ranks, (2, W N, dim), and which is the first of this one's."""
        if not self.training or distributed.world_size() == 1:
            return k, 0
        gathered = distributed.all_gather_rows(k.transpose(0, 1))  # both directions in one collective
        return gathered.transpose(0, 1).contiguous(), k.shape[1] * distributed.rank()

    def _facts(self, x1: Tensor, x2: Tensor, m: float | Tensor) -> dict[str, object]:
        """What has to be the same on every rank; raises for what is wrong with a step."""
        T = checks.temperature("T", self.T)  # it may have been set since the constructor
        shapes = steps.check_views(x1=x1, x2=x2)
        if self.training:
            steps.check_shards(self, "momentum_encoder", "base_encoder")
        value: object = m
        if isinstance(m, Tensor):
            beside = next(self.momentum_encoder.parameters())
            checks.scalar_tensor("m", m, "momentum_encoder", beside)
            value = m.item() if m.device.type == "cpu" else "a tensor"
        if value != "a tensor":
            value = checks.fraction("m", value)
        return shapes | {"T": T, "m": value, "dim": self.dim}


class MoCo_ResNet(MoCoV3):
    """MoCo v3 of a convolutional network: a projector of two layers, a predictor without a last norm.

    Any encoder whose head :func:`moco_fast.models.heads.head_path` finds. Arguments: :class:`MoCoV3`.
    """

    PROJECTOR_LAYERS, PREDICTOR_NORM = 2, False


class MoCo_ViT(MoCoV3):
    """MoCo v3 of a vision transformer: a projector of three layers, a predictor with a last norm.

    Encoders: :mod:`moco_fast.models.vits`. Arguments: :class:`MoCoV3`.
    """

    PROJECTOR_LAYERS, PREDICTOR_NORM = 3, True
