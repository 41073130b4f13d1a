"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moco_fast import backends, checks, reference
from moco_fast.distributed import local_shards
from moco_fast.optim.base import EMAOptimizer, refuse_capture


class AdamW(EMAOptimizer):
    """``torch.optim.AdamW`` with the key encoder's EMA in its step.

    Formula: :func:`moco_fast.reference.adamw_`; equal to torch's to rounding.
    The state ``step`` is a float32 tensor on the parameter's device, so that a captured CUDA graph counts on.

    Args:
        params, lr, maximize, ema, m: as in :class:`SGD`.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        amsgrad: not supported, must be False.

    Raises:
        TypeError, ValueError: an argument out of range, named.
    """

    op = "adamw_"
    unsupported = ("amsgrad", "differentiable")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        ema: Iterable[tuple[Tensor, Tensor]] = (),
        m: float | Tensor = 0.999,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, ema, m)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative("eps", group["eps"])
        for i, beta in enumerate(group["betas"]):
            if not 0 <= checks.number(f"betas[{i}]", beta) < 1:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta!r}")

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], keys: list[Tensor | None]
    ) -> None:
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                refuse_capture(param)
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            elif not (isinstance(state["step"], Tensor) and state["step"].device == param.device):
                # of a checkpoint of torch.optim, an old one if it is a number
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
        steps, averages, squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        torch._foreach_add_(steps, 1)
        params, grads, keys = local_shards(params), local_shards(grads), local_shards(keys)
        averages, squares = local_shards(averages), local_shards(squares)
        torch.autograd.graph.increment_version([*averages, *squares])
        beta1, beta2 = group["betas"]
        numbers = reference.AdamwStep(beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])
        backend = backends.choose("adamw_", params[:1])
        backend.adamw_(params, grads, averages, squares, steps, keys, group["lr"], self.m, numbers)
