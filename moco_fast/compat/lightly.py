"""What MoCo scripts import from lightly: signatures, state-dict keys and results as there, kernels of ours.

In place of::

    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import activate_requires_grad, deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule

What differs on purpose: docs/migration.md. Source: lightly 1.6, https://github.com/lightly-ai/lightly.
Tests: tests/test_compat_lightly.py, and beside it those of the bank, of training and of ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed
from torch.nn import functional as F

from moco_fast import checks, distributed, ops
from moco_fast.compat import trained_keys
from moco_fast.compat.memory_bank import MemoryBank
from moco_fast.reference import compute_dtype

__all__ = [
    "MoCoProjectionHead",
    "NTXentLoss",
    "activate_requires_grad",
    "cosine_schedule",
    "deactivate_requires_grad",
    "update_momentum",
]


class NTXentLoss(nn.Module):
    """Contrastive loss of two views: of a batch, or of queries against keys and a bank of past keys.

    Without a bank, over the 2N views z of the batch, i' the other view of i (:func:`moco_fast.nt_xent`)::

        loss = mean_i -log( exp(z^_i.z^_i'/T) / sum_{j != i} exp(z^_i.z^_j/T) )

    With a bank, whose rows n_j are the only negatives (:func:`moco_fast.info_nce`)::

        loss = mean_i -log( exp(q^_i.k^_i/T) / (exp(q^_i.k^_i/T) + sum_j exp(q^_i.n_j/T)) )

    After that, and only if ``out0`` requires grad, the keys replace the oldest rows of the bank. Neither form
    holds its logits in memory.

    With ``gather_distributed`` the batch is that of all ranks, and the loss its mean, the same on every rank.
    Gradients to this rank's views come from the losses of all ranks; DistributedDataParallel then averages.
    With a bank, its rows come from all ranks.

    Sources: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
    equation 1; He et al. 2020, "Momentum Contrast", equation 1.

    Args:
        temperature: T, not 0. Below 0, which no kernel serves, the batch's logits are held in memory.
        memory_bank_size: see :class:`moco_fast.compat.memory_bank.MemoryBank`; 0 for the batch alone.
        gather_distributed: over all ranks.

    Attributes:
        memory_bank: the bank; ``memory_bank.bank`` its rows.
        temperature, gather_distributed: as given.

    Raises:
        TypeError: arguments of another type.
        ValueError: a temperature nearer to 0 than 1e-8 or not finite, a bad size, or gather_distributed
            where torch has no distributed package.

    Example:
        >>> criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        >>> loss = criterion(query, key.detach())
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not 1e-8 <= abs(checks.number("temperature", temperature)) < math.inf:
            raise ValueError(f"temperature must be finite and at least 1e-8 away from 0, got {temperature!r}")
        if gather_distributed and not torch_distributed.is_available():
            raise ValueError("gather_distributed must be False where torch.distributed is not available")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)

    def forward(
        self,
        out0: Tensor,  # (N, C)
        out1: Tensor,  # (N, C)
    ) -> Tensor:
        """The mean loss, as in the class.

        Args:
            out0: one view of every image, not normalised; with a bank the queries.
            out1: the other; with a bank the keys.

        Returns:
            A scalar in fp32 (float64 for float64 inputs), also under autocast.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes or devices do not match, an empty batch, another width than the bank's.
        """
        out0, out1 = checks.tensor("out0", out0, ndim=2), checks.tensor("out1", out1, ndim=2)
        checks.same_shape("out0", out0, "out1", out1)
        checks.same_device("out0", out0, "out1", out1)
        if out0.shape[0] == 0:
            raise ValueError(f"out0 must hold at least one row, got shape {tuple(out0.shape)}")
        second = out1.to(out0.dtype)  # under autocast one of two encoders may have answered in fp32
        if self.memory_bank.size[0] == 0:
            return self._of_batch(out0, second)
        self.memory_bank.prepare(out0)
        # A negative temperature is a positive one against the opposite directions.
        loss = trained_keys.info_nce(
            out0 if self.temperature > 0 else -out0, second, self.memory_bank.negatives, abs(self.temperature)
        )
        if out0.requires_grad:
            self.memory_bank.update_(out1)
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"

    def _of_batch(self, out0: Tensor, out1: Tensor) -> Tensor:
        views = torch.stack([out0, out1])
        if self.gather_distributed:
            # Ranks come first in what is gathered.
            by_image = distributed.all_gather_rows_with_grad(views.transpose(0, 1), same_loss=True)
            views = by_image.transpose(0, 1)
        if self.temperature > 0:
            return ops.nt_xent(views[0], views[1], self.temperature)
        z = F.normalize(views.flatten(0, 1).to(compute_dtype(views)), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.t() / self.temperature).masked_fill(itself, -math.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


class MoCoProjectionHead(nn.Module):
    """The projection MLP of MoCo: linear layers with ReLU between them, under ``layers``.

    Without batch norms the state dict has ``layers.0`` and ``layers.2`` for two layers; with them every
    linear layer is followed by one, and has no bias.

    Args:
        input_dim: features of the backbone.
        hidden_dim: features of the hidden layers, 2048 in MoCo v2, 4096 in v3.
        output_dim: features of the embedding, 128 in v2, 256 in v3.
        num_layers: linear layers, at least 2; 3 in v3.
        batch_norm: as in v3.

    Raises:
        TypeError, ValueError: a number that is not a positive integer, num_layers below 2.

    Source: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 2.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        num_layers: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, dim in (("input_dim", input_dim), ("hidden_dim", hidden_dim), ("output_dim", output_dim)):
            checks.count(name, dim)
        if checks.count("num_layers", num_layers) < 2:
            raise ValueError(f"num_layers must be at least 2, got {num_layers}")
        layers: list[nn.Module] = []
        for width, out in pairwise([input_dim, *[hidden_dim] * (num_layers - 1), output_dim]):
            layers.append(nn.Linear(width, out, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(out))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers[:-1])

    def forward(
        self,
        x: Tensor,  # (N, input_dim)
    ) -> Tensor:
        """The embeddings, (N, output_dim), not normalised."""
        return self.layers(x)


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float | Tensor) -> None:
    """Move every parameter of ``model_ema`` towards that of ``model``: ``ema <- m * ema + (1 - m) * p``.

    Parameters alone, in one launch (:func:`moco_fast.ema_update_`): the statistics of batch norms are the key
    encoder's own. Source: He et al. 2020, "Momentum Contrast", equation 2.

    Args:
        model: what is trained.
        model_ema: its momentum copy, written in place.
        m: momentum in [0, 1]; a 0-d tensor is not read back.

    Raises:
        ValueError: m out of range, or parameters that do not pair up; the message calls those of
            ``model_ema`` targets, those of ``model`` sources.
    """
    # A copy that was not deactivated still requires grad, which is no hindrance to being overwritten.
    targets = [p.detach() if p.requires_grad else p for p in model_ema.parameters()]
    ops.ema_update_(targets, list(model.parameters()), m)


def deactivate_requires_grad(model: nn.Module) -> None:
    """No parameter of the model requires grad from now on."""
    model.requires_grad_(False)


def activate_requires_grad(model: nn.Module) -> None:
    """All parameters of the model require grad from now on."""
    model.requires_grad_(True)


def cosine_schedule(
    step: int,
    max_steps: int,
    start_value: float,
    end_value: float,
    period: int | None = None,
) -> float:
    """The value at a step between two, along half a cosine, or along a periodic one.

    ``end - (end - start) * (1 + cos(pi * step / (max_steps - 1))) / 2``, and ``end`` from the last step on;
    with a period ``cos(2 * pi * step / period)``, whatever ``max_steps`` is.

    Args:
        step: counted from 0. One beyond ``max_steps`` warns, unless there is a period.
        max_steps: steps of the half cosine.
        start_value: at step 0.
        end_value: at step ``max_steps - 1``, or after half a period.
        period: steps of a whole cosine.

    Raises:
        ValueError: step or max_steps negative, a period not above 0.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if max_steps < 0:
        raise ValueError(f"max_steps must not be negative, got {max_steps}")
    if period is not None and period <= 0:
        raise ValueError(f"period must be above 0, got {period}")
    if period is None and step > max_steps:
        warnings.warn(f"step {step} is beyond max_steps {max_steps}", RuntimeWarning, stacklevel=2)
    if period is None and step >= max_steps - 1:
        return float(end_value)
    turn = math.pi * step / (max_steps - 1) if period is None else 2 * math.pi * step / period
    return end_value - (end_value - start_value) * (1 + math.cos(turn)) / 2
