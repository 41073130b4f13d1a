"""What a checkpoint holds, whoever wrote it: the form between all layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moco_fast import checks
from moco_fast.models.backbones import VITS
from moco_fast.models.moco import MoCo
from moco_fast.models.moco_v3 import MoCo_ResNet, MoCo_ViT
from moco_fast.train.checkpoint import CheckpointError, mismatches, shortened
from moco_fast.train.pretrained import factory

MOCO, MOCO_V3 = "moco", "moco-v3"  # with a queue; with a predictor
OFFICIAL_NAMES = {MOCO: ("encoder_q.", "encoder_k."), MOCO_V3: ("base_encoder.", "momentum_encoder.")}


@dataclass(frozen=True)
class Encoder:
    """An encoder in its two parts.

    Attributes:
        backbone: weights and statistics under the names of torchvision or timm, without a classifier.
        head: of the projector by the index of the layer, "0.weight"; a single linear layer is layer 0.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        layout: whose layout the file has.
        method: "moco" (v1 and v2), "moco-v3", or another, of which only the encoder can be converted.
        arch: name of the backbone.
        facts: how the backbone is built and what it sees, as ``train.pretrained.recorded`` returns them.
        head_path: where the projector is inside an official encoder, such as "fc".
        encoders: "q", the trained one; "k", its moving average, where there is one.
        queue: (dim, K) float32, of "moco", unless the file lost it.
        queue_ptr: (1,) int64, beside a queue.
        predictor: of "moco-v3", by the index of the layer.
        training: what official files hold beside the state dict, to resume training from.
        dropped: what the file holds and none of the above does.
    """

    layout: str
    method: str
    arch: str
    facts: Mapping[str, Any]
    head_path: str
    encoders: dict[str, Encoder]
    queue: Tensor | None = None
    queue_ptr: Tensor | None = None
    predictor: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def encoder(self, role: str) -> Encoder:
        """The encoder "q" or "k".

        Raises:
            CheckpointError: the file has none.
        """
        if role not in self.encoders:
            raise CheckpointError(f"a checkpoint of {self.method} has no encoder {role}: give --encoder q")
        return self.encoders[role]

    def with_fresh_queue(self, K: int) -> Contents:
        """The same with a queue of K random unit keys, which training replaces in K / batch steps.

        Raises:
            TypeError, ValueError: K is not a positive integer.
            CheckpointError: the method has no queue.
        """
        checks.count("queue_size", K)
        if self.method != MOCO:
            raise CheckpointError(f"queue_size must be left out: {self.method} has no queue")
        dim = _out_features(self.encoder("q").head)
        keys = torch.randn(dim, K, generator=torch.Generator().manual_seed(0))
        dropped = self.dropped
        if self.queue is not None:
            dropped += (f"the queue of K={self.queue.shape[1]} for a fresh one of K={K}",)
        return replace(
            self, queue=F.normalize(keys, dim=0), queue_ptr=torch.zeros(1, dtype=torch.long), dropped=dropped
        )

    def official_state(self) -> dict[str, Tensor]:
        """The state dict of the official model, without DDP's prefix, in its order.

        Raises:
            CheckpointError: another method; or something is missing, left over or of another shape.
        """
        if self.method not in OFFICIAL_NAMES:
            raise CheckpointError(
                f"a checkpoint of {self.method} lacks parts of MoCo: only its encoder can be converted, with "
                "--to torchvision, timm or detectron2, or --to safetensors --encoder q"
            )
        if self.method == MOCO and self.queue is None:
            unused = f" (unused: {shortened(self.dropped)})" if self.dropped else ""
            raise CheckpointError(
                f"the file of {self.layout} lost its queue{unused}, which official files hold: give "
                "--queue-size 65536, or what you trained with, for a fresh one, which training fills"
            )
        state = {f"predictor.{name}": value for name, value in self.predictor.items()}
        for role, prefix in zip("qk", OFFICIAL_NAMES[self.method], strict=True):
            if (encoder := self.encoders.get(role)) is None:
                continue
            state |= {prefix + name: value for name, value in encoder.backbone.items()}
            linear = {name.split(".")[0] for name in encoder.head} == {"0"} and self.method == MOCO
            state |= {
                f"{prefix}{self.head_path}.{name.removeprefix('0.') if linear else name}": value
                for name, value in encoder.head.items()
            }
        state |= {n: v for n, v in (("queue", self.queue), ("queue_ptr", self.queue_ptr)) if v is not None}
        wanted = self._official_shapes()
        if problems := mismatches(state, wanted):
            raise CheckpointError(
                f"the file of {self.layout} does not fill an official {self.method}: {problems}"
            )
        return {name: state[name] for name in wanted}

    def _official_shapes(self) -> dict[str, Tensor]:
        """What the official model would hold, as tensors without memory."""
        head, build = self.encoder("q").head, factory(self.arch, self.facts)
        dim = _out_features(head)
        model: torch.nn.Module
        with torch.device("meta"):
            if self.method == MOCO:
                assert self.queue is not None
                layers = [value for value in head.values() if value.ndim == 2]
                model = MoCo(build, dim, self.queue.shape[1], mlp=len(layers) > 1)
            else:
                kind = MoCo_ViT if self.arch in VITS else MoCo_ResNet
                model = kind(build, dim, len(self.predictor.get("0.weight", ())) or 1)
        return model.state_dict()


def _out_features(head: Mapping[str, Tensor]) -> int:
    """The dim of an embedding: what the last linear layer of a head returns."""
    linears = [value for value in head.values() if value.ndim == 2]
    if not linears:
        raise CheckpointError(
            "the file holds no projector, which official files do: only its backbone serves"
        )
    return linears[-1].shape[0]
