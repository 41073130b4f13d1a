"""The memory bank: a row per training image, from which negatives are drawn.

Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination"; with InfoNCE, He et al. 2020, "Momentum Contrast",
section 3.3 and figure 2b.
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
from moco_fast.models.nce import estimated_normaliser, nce

LOSSES = ("info_nce", "nce")


class MemoryBank(Method):
    """An encoder whose positives and negatives are features of the images when they were last seen.

    ``row <- normalise(momentum * row + (1 - momentum) * feature)`` for every image of a step, after its loss.

    Over several ranks the bank is the same on all of them, and so are the negatives of a step: those that one
    process draws for the whole batch.

    Args:
        base_encoder: called as ``base_encoder(num_classes=dim)``.
        count: training images.
        dim: features of the embedding.
        K: negatives of a step, drawn uniformly with repetition from all rows, shared by the batch.
        T: softmax temperature, above 0.
        momentum: of the rows, in [0, 1].
        mlp: projection MLP instead of a linear layer, as in MoCo v2.
        loss: "info_nce"; or "nce", that of the 2018 paper, see :func:`moco_fast.models.nce.nce`.

    Attributes:
        bank: (count, dim) float32, unit rows, random at first (section 3.1).
        Z: () float64, the constant of "nce", estimated on the first batch (section 3.2); 0 before.
        generator: draws the negatives; a checkpoint from which losses shall repeat holds its ``state()``.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> model = MemoryBank(torchvision.models.resnet50, len(dataset), 128, K=4096)
        >>> loss = model(view, indices)
    """

    encoder: nn.Module

    bank: Tensor
    Z: Tensor

    # DDP would otherwise broadcast the bank in every forward.
    _ddp_params_and_buffers_to_ignore = not_broadcast("bank", "Z")

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        count: int,
        dim: int = 128,
        K: int = 4096,
        T: float = 0.07,
        momentum: float = 0.5,
        mlp: bool = False,
        loss: str = "info_nce",
    ) -> None:
        super().__init__()
        checks.count("count", count)
        checks.count("K", K)
        checks.one_of("loss", loss, LOSSES)
        self.T, self.momentum = checks.temperature("T", T), checks.fraction("momentum", momentum)
        self.K, self.objective = K, loss
        encoder, self.head = steps.build_encoder(base_encoder, dim)
        if mlp:
            heads.insert_mlp(encoder, self.head)
        self.encoder = encoder
        self.register_buffer("bank", F.normalize(2 * torch.rand(count, dim) - 1, dim=1))
        self.register_buffer("Z", torch.zeros((), dtype=torch.float64))
        self.generator = distributed.CommonGenerator()
        self._settled = False  # the ranks hold one bank, and Z is known

    def forward(
        self,
        im: Tensor,  # (N, ...)
        indices: Tensor,  # (N,) int64
        *,
        return_stats: bool = False,
    ) -> Any:
        """The loss of images against their rows and the drawn ones.

        In training their rows are written after it: those of all ranks, on every rank; of an image that is
        there twice, the last counts. In eval mode nothing changes, and the negatives are always the same.

        Args:
            im: one view of every image.
            indices: which images of the training set they are, in [0, count).
            return_stats: also return means over the images.

        Returns:
            The mean loss over this rank's images; with ``return_stats`` also a dict of the means that
            :meth:`moco_fast.ops.InfoNCEStats.means` names.

        Raises:
            TypeError: no tensor of images, or indices are not int64 of one dimension.
            ValueError: indices not as many as images, on another device, or, on a CPU, out of range; T or
                momentum out of range.
            Disagreement: on every rank, if ranks were given different things.
        """
        steps.agree(self, lambda: self._facts(im, indices), getattr(im, "device", None))
        features = F.normalize(self.encoder(im).to(self.bank.dtype), dim=1)
        if self.training and not self._settled:
            distributed.broadcast_(self.bank, self.Z)
        if self.training and self.generator.generator is None:
            self.generator.agree(self.bank.device)
        positive, drawn = ops.take_rows(self.bank, indices), ops.take_rows(self.bank, self._draw())
        Z = self._normaliser(features, drawn)
        loss, stats = self._loss(features, positive, drawn, Z, return_stats)
        if self.training:
            self.Z.copy_(Z)
            self._settled = True
            self._write(features.detach(), positive, indices)
        return (loss, stats) if return_stats else loss

    def _draw(self) -> Tensor:
        """Rows of the bank, (K,) int64."""
        # Evaluation neither moves the generator nor depends on it.
        generator = self.generator.generator if self.training else torch.Generator().manual_seed(0)
        rows = torch.randint(len(self.bank), (self.K,), generator=generator, device="cpu")
        if self.bank.is_cuda:
            rows = rows.pin_memory().to(self.bank.device, non_blocking=True)
        return rows

    def _normaliser(self, features: Tensor, drawn: Tensor) -> Tensor:
        """Z, or an estimate of it where none has been made."""
        if self._settled or self.objective != "nce":
            return self.Z
        found = estimated_normaliser(features, drawn, self.T, len(self.bank))
        if self.training:
            found = distributed.all_gather_rows(found[None]).mean()
        return torch.where(self.Z > 0, self.Z, found.to(self.Z.dtype))  # it may have been loaded

    def _loss(
        self, features: Tensor, positive: Tensor, drawn: Tensor, Z: Tensor, need_stats: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.objective == "nce":
            loss = nce(features, positive, drawn, self.T, Z, len(self.bank)).mean()
            if not need_stats:
                return loss, {}
            _, found = ops.info_nce(features.detach(), positive, drawn, self.T, return_stats=True)
        else:
            loss, found = ops.info_nce(features, positive, drawn, self.T, return_stats=True)
        return loss, found.means()

    @torch.no_grad()
    def _write(self, features: Tensor, rows: Tensor, indices: Tensor) -> None:
        rows = F.normalize(rows.lerp(features, 1 - self.momentum), dim=1)
        rows, indices = distributed.all_gather_rows(rows), distributed.all_gather_rows(indices)
        # All that write one row write the same, its last: the order of writes, open on a GPU, is not seen.
        ordered, order = indices.sort(stable=True)
        last = order[torch.searchsorted(ordered, indices, right=True) - 1]
        self.bank.index_copy_(0, indices, rows[last])

    def _facts(self, im: Tensor, indices: Tensor) -> dict[str, object]:
        checks.temperature("T", self.T)  # these may have been set since the constructor
        checks.fraction("momentum", self.momentum)
        shapes = steps.check_views(im=im)
        checks.in_range("indices", checks.per_row("indices", indices, "im", im), len(self.bank))
        own = (self.bank.shape, self.K, self.T, self.momentum, self.objective, self._settled)
        return shapes | {
            "the bank, K, T, momentum, loss, and whether they are settled": own,
            "the state of the generator": self.generator.digest(),
        }

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._settled = False
