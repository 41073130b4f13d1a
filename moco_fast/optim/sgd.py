"""SGD and LARS, whose steps are one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moco_fast import backends, checks, reference
from moco_fast.distributed import local_shards
from moco_fast.optim.base import EMAOptimizer, refuse_capture


class SGD(EMAOptimizer):
    """``torch.optim.SGD``, bit for bit in fp32, with the key encoder's EMA in its step.

    Formula: :func:`moco_fast.reference.sgd_`. Parameters, gradients and keys of one dtype among fp32, bf16,
    fp16 and float64, dense and laid out alike, take one kernel; all others plain PyTorch.

    Args:
        params: parameters or groups, as in torch.optim; those without a gradient are left as they are.
        lr: learning rate; a 0-d tensor on the parameters' device can change under a captured CUDA graph.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        ema: (key, query) pairs of parameters; :meth:`moco_fast.MoCo.move_ema_into_step` gives them.
            Every step ends with ``key <- m * key + (1 - m) * query``, gradient or not.
        m: momentum of the keys, in [0, 1]; a 0-d tensor on their device is not read back. An attribute, to
            be set before each step where it follows a schedule.

    Raises:
        TypeError, ValueError: an argument out of range, named.

    Example:
        >>> pairs = model.move_ema_into_step()
        >>> optimizer = moco_fast.SGD(model.parameters(), 0.03, momentum=0.9, ema=pairs, m=model.m)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        ema: Iterable[tuple[Tensor, Tensor]] = (),
        m: float | Tensor = 0.999,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, ema, m)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative("momentum", group["momentum"])
        checks.number("dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs momentum above 0 and dampening 0, "
                f"got momentum={group['momentum']!r}, dampening={group['dampening']!r}"
            )

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], keys: list[Tensor | None]
    ) -> None:
        numbers = reference.SgdStep(
            group["momentum"], group["dampening"], group["weight_decay"], 0.0,
            group["nesterov"], group["maximize"], first=False,
        )  # fmt: skip
        _sgd_step(self, params, grads, keys, group["lr"], numbers, "momentum_buffer")


class LARS(EMAOptimizer):
    """Layer-wise adaptive rate scaling, as MoCo v3 trains with, and the key encoder's EMA in its step::

        d = grad + weight_decay * param, times trust_coefficient * |param| / |d|    where param.ndim > 1
        mu = momentum * mu + d;  param = param - lr * mu

    Biases and norms (one dimension or none) get neither weight decay nor scaling.
    Source: You et al. 2017, "Large Batch Training of Convolutional Networks".

    Args:
        params, lr, ema, m: as in :class:`SGD`.
        weight_decay, momentum, trust_coefficient: as in the formula.

    Raises:
        TypeError, ValueError: an argument out of range, named.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0,
        weight_decay: float = 0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        *,
        ema: Iterable[tuple[Tensor, Tensor]] = (),
        m: float | Tensor = 0.999,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults, ema, m)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.not_negative("momentum", group["momentum"])
        checks.not_negative("trust_coefficient", group["trust_coefficient"])
        if group["trust_coefficient"] == 0:
            raise ValueError("trust_coefficient must be above 0, got 0: it would stop every weight matrix")

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], keys: list[Tensor | None]
    ) -> None:
        rows = list(zip(params, grads, keys, strict=True))
        for adapted in (True, False):
            chosen = [row for row in rows if (row[0].ndim > 1) == adapted]
            if chosen:
                decay, trust = (group["weight_decay"], group["trust_coefficient"]) if adapted else (0.0, 0.0)
                numbers = reference.SgdStep(group["momentum"], 0.0, decay, trust, False, False, first=False)
                weights, slopes, followers = (list(column) for column in zip(*chosen, strict=True))
                _sgd_step(self, weights, slopes, followers, group["lr"], numbers, "mu")


def _sgd_step(
    optimizer: EMAOptimizer,
    params: list[Tensor],
    grads: list[Tensor],
    keys: list[Tensor | None],
    lr: float | Tensor,
    numbers: reference.SgdStep,
    buffer_name: str,
) -> None:
    """One call of the backend for the parameters whose buffers hold something, one for the others."""
    if numbers.trust and any(hasattr(param, "to_local") for param in params):
        raise RuntimeError("LARS does not support sharded parameters: its norms are those of whole tensors")
    if numbers.momentum == 0:
        params, grads, keys = local_shards(params), local_shards(grads), local_shards(keys)
        backend = backends.choose("sgd_", params[:1])
        backend.sgd_(params, grads, [None] * len(params), keys, lr, optimizer.m, numbers)
        return
    states = [optimizer.state[param] for param in params]
    fresh = [state.get(buffer_name) is None for state in states]
    for first in (False, True):
        rows = [i for i, is_first in enumerate(fresh) if is_first == first]
        if not rows:
            continue
        chosen, with_grads, with_keys = (
            [params[i] for i in rows], [grads[i] for i in rows], [keys[i] for i in rows],
        )  # fmt: skip
        if first:
            for i in rows:
                refuse_capture(params[i])
                states[i][buffer_name] = torch.empty_like(params[i], memory_format=torch.preserve_format)
        buffers = local_shards(states[i][buffer_name] for i in rows)
        chosen, with_grads = local_shards(chosen), local_shards(with_grads)
        with_keys = local_shards(with_keys)
        torch.autograd.graph.increment_version(buffers)
        backends.choose("sgd_", chosen[:1]).sgd_(
            chosen, with_grads, buffers, with_keys, lr, optimizer.m, numbers._replace(first=first)
        )
