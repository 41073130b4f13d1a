"""DINO: a student learns the centred, sharpened output of its momentum teacher.

Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
Transformers", section 3 and algorithm 1; two global crops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.models import heads, steps
from moco_fast.models.method import Method, not_broadcast


class DINO(Method):
    """A student and its momentum teacher, compared over prototypes without the logits of either.

    Each is an encoder whose head is an MLP of three layers with GELU and no batch norm, an l2 norm, and a
    layer of weight-normalised prototypes whose norm is fixed to 1. Both crops pass an encoder as one batch.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``, student first, then teacher.
        dim: features of the bottleneck, which the prototypes are compared with.
        prototypes: outputs of student and teacher.
        mlp_dim: features of the head's two hidden layers.
        student_T: temperature of the student, above 0.
        teacher_T: that of the teacher, lower: it sharpens. :meth:`forward` takes another for a warm-up.
        center_momentum: of the center, in [0, 1].

    Attributes:
        center: (prototypes,), the running mean of the teacher's logits; the same on all ranks.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = DINO(torchvision.models.resnet50)
        >>> loss = model(view_1, view_2, m=0.996)
    """

    center: Tensor

    # The same on all ranks since the first step; DDP would broadcast it in every forward.
    _ddp_params_and_buffers_to_ignore = not_broadcast("center")

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 256,
        prototypes: int = 65536,
        mlp_dim: int = 2048,
        student_T: float = 0.1,
        teacher_T: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        checks.count("prototypes", prototypes)
        checks.count("mlp_dim", mlp_dim)
        self.student_T = checks.temperature("student_T", student_T)
        self.teacher_T = checks.temperature("teacher_T", teacher_T)
        self.center_momentum = checks.fraction("center_momentum", center_momentum)
        self.student, self.head = _with_head(base_encoder, dim, mlp_dim)
        self.teacher, _ = _with_head(base_encoder, dim, mlp_dim)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, dim), dim=1))
        self.teacher_prototypes = nn.Parameter(torch.empty_like(self.prototypes), requires_grad=False)
        for target, source in self._pairs():
            target.data.copy_(source.data)
            target.requires_grad = False
        self.register_buffer("center", torch.zeros(prototypes))
        self._settled = False  # the ranks hold one center

    @property
    def encoder(self) -> nn.Module:
        """The submodule that is pretrained and kept."""
        return self.teacher

    def forward(
        self,
        x1: Tensor,  # (N, ...)
        x2: Tensor,  # (N, ...)
        m: float,
        teacher_T: float | None = None,
        *,
        return_stats: bool = False,
    ) -> Any:
        """Cross-entropy of the student's output for each crop with the teacher's for the other, their mean.

        In training the teacher moves towards the student first, and after the loss the center towards the
        mean of the teacher's logits, over all ranks. In eval mode nothing changes.

        Args:
            x1: one global crop of every image.
            x2: the other, of the same shape.
            m: momentum of the teacher, in [0, 1].
            teacher_T: temperature of the teacher in this step, if not that of the model.
            return_stats: also return means over the student's and teacher's bottlenecks.

        Returns:
            The mean loss over both directions; with ``return_stats`` also a dict of the means that
            :meth:`moco_fast.ops.InfoNCEStats.means` names.

        Raises:
            TypeError, ValueError: views that are no images or do not match, m or a temperature out of range.
            Disagreement: on every rank, if ranks were given different things.
            RuntimeError: sharded by FSDP2.
        """
        teacher_T = self.teacher_T if teacher_T is None else teacher_T
        steps.agree(self, lambda: self._facts(x1, x2, m, teacher_T), getattr(x1, "device", None))
        if self.training:
            if not self._settled:
                distributed.broadcast_(self.center)
                self._settled = True
            targets, sources = zip(*self._pairs(), strict=True)
            ops.ema_update_(list(targets), list(sources), m)
        images = torch.cat([x1, x2])
        student = self.student(images)
        with torch.no_grad():
            teacher = self.teacher(images)
            teacher_prototypes = F.normalize(self.teacher_prototypes, dim=1)
        # Each row of the student beside the other crop's row of the teacher.
        student = student.roll(len(x1), 0)
        prototypes = F.normalize(self.prototypes, dim=1)
        loss = ops.dino(
            student, teacher, prototypes, teacher_prototypes, self.center, self.student_T, teacher_T
        )
        if self.training:
            self._move_center(teacher, teacher_prototypes)
        if not return_stats:
            return loss
        return loss, steps.pair_stats(student, teacher, torch.arange(len(student), device=student.device))

    @torch.no_grad()
    def _move_center(
        self,
        teacher: Tensor,  # (2N, dim), raw
        prototypes: Tensor,  # (P, dim)
    ) -> None:
        """``center <- c center + (1 - c) mean of the logits``; they are linear: ``prototypes @ mean row``."""
        with torch.autocast(teacher.device.type, enabled=False):
            mean = F.normalize(teacher.to(self.center.dtype), dim=1).mean(dim=0, keepdim=True)
            mean = distributed.all_gather_rows(mean).mean(dim=0)
            logits = prototypes.to(self.center.dtype) @ mean
        self.center.lerp_(logits, 1 - self.center_momentum)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters of the teacher, and those of the student that they follow."""
        encoders = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        return [*encoders, (self.teacher_prototypes, self.prototypes)]

    def _facts(self, x1: Tensor, x2: Tensor, m: object, teacher_T: object) -> dict[str, object]:
        if hasattr(self, "unshard"):  # FSDP2 has gathered the prototypes, and drops what is written to them
            raise RuntimeError(
                "DINO cannot be sharded by FSDP2: its teacher's prototypes, which a step updates, are "
                "parameters of the model itself. DistributedDataParallel serves."
            )
        checks.temperature("student_T", self.student_T)  # these may have been set since the constructor
        checks.fraction("center_momentum", self.center_momentum)
        own = {
            "m": checks.fraction("m", m),
            "teacher_T": checks.temperature("teacher_T", teacher_T),
            "student_T, center_momentum": (self.student_T, self.center_momentum),
        }
        return steps.check_views(x1=x1, x2=x2, same_shape=True) | own


def _with_head(base_encoder: Callable[..., nn.Module], dim: int, mlp_dim: int) -> tuple[nn.Module, str]:
    encoder, path = steps.build_encoder(base_encoder, dim)
    width: Any = encoder.get_submodule(path).in_features
    mlp = nn.Sequential(
        nn.Linear(width, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim)
    )
    heads.replace(encoder, path, mlp)
    return encoder, path
