"""Steps of optimizers that end with the EMA of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moco_fast.reference.common import compute_dtype
from moco_fast.reference.ema_update import ema_update_


class SgdStep(NamedTuple):
    """Numbers of a step of SGD or LARS, in the order the kernels take them."""

    momentum: float
    dampening: float
    weight_decay: float
    trust: float  # LARS's trust coefficient; 0 for SGD
    nesterov: bool
    maximize: bool
    first: bool  # the buffers hold nothing yet


class AdamwStep(NamedTuple):
    """Numbers of a step of AdamW, in the order the kernels take them."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | list[None],  # None without momentum
    keys: list[Tensor | None],
    lr: float | Tensor,  # a tensor is 0-d, on the CPU or beside the parameters; so is m
    m: float | Tensor,
    step: SgdStep,
) -> None:
    """One step of SGD or LARS, and the EMA of the parameters that have a key, in place::

        d = -grad if maximize else grad
        d = d + weight_decay * param
        d = d * trust * |param| / |d|           LARS, where both norms are above 0
        buffer = d if first else momentum * buffer + (1 - dampening) * d
        d = d + momentum * buffer if nesterov else buffer
        param = param - lr * d
        key = m * key + (1 - m) * param

    Source: torch.optim.SGD; You et al. 2017, "Large Batch Training of Convolutional Networks".
    """
    values, updates = _widened(params), _widened(grads)
    if step.maximize:
        updates = list(torch._foreach_neg(updates))
    if step.weight_decay:
        updates = list(torch._foreach_add(updates, values, alpha=step.weight_decay))
    if step.trust:
        sizes, lengths = torch._foreach_norm(values), torch._foreach_norm(updates)
        updates = [
            d * torch.where((p > 0) & (n > 0), step.trust * p / n, 1).to(d.dtype)
            for d, p, n in zip(updates, sizes, lengths, strict=True)
        ]
    if step.momentum:
        held = [buffer for buffer in buffers if buffer is not None]
        if step.first:
            state = updates
        else:
            state = _widened(held)
            torch._foreach_mul_(state, step.momentum)
            torch._foreach_add_(state, updates, alpha=1 - step.dampening)
        _store(held, state)
        updates = list(torch._foreach_add(updates, state, alpha=step.momentum)) if step.nesterov else state
    if _on_device(lr):
        torch._foreach_add_(values, [d * -lr for d in updates])
    else:
        torch._foreach_add_(values, updates, alpha=-float(lr))
    _store(params, values)
    _follow(keys, params, m)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],  # 0-d float32, this step counted
    keys: list[Tensor | None],
    lr: float | Tensor,  # a tensor is 0-d, on the CPU or beside the parameters; so is m
    m: float | Tensor,
    step: AdamwStep,
) -> None:
    """One step of AdamW, and the EMA of the parameters that have a key, in place::

        g = -grad if maximize else grad
        average = beta1 * average + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g^2
        param = param * (1 - lr * weight_decay)
        param = param - lr / (1 - beta1^t) * average / (sqrt(square) / sqrt(1 - beta2^t) + eps)
        key = m * key + (1 - m) * param

    Source: torch.optim.AdamW; Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    values, gradients = _widened(params), _widened(grads)
    means, spreads = _widened(averages), _widened(squares)
    if step.maximize:
        gradients = list(torch._foreach_neg(gradients))
    torch._foreach_lerp_(means, gradients, 1 - step.beta1)
    torch._foreach_mul_(spreads, step.beta2)
    torch._foreach_addcmul_(spreads, gradients, gradients, 1 - step.beta2)
    counts = [t.double() for t in steps]
    sizes = [lr / correction for correction in _corrections(step.beta1, counts)]
    divisors = torch._foreach_sqrt(spreads)
    torch._foreach_div_(divisors, torch._foreach_sqrt(_corrections(step.beta2, counts)))
    torch._foreach_add_(divisors, step.eps)
    torch._foreach_mul_(values, 1 - lr * step.weight_decay)
    torch._foreach_sub_(values, torch._foreach_div(torch._foreach_mul(means, sizes), divisors))
    for held, state in ((averages, means), (squares, spreads), (params, values)):
        _store(held, state)
    _follow(keys, params, m)


def _corrections(beta: float, counts: list[Tensor]) -> tuple[Tensor, ...]:
    """1 - beta^t of every count, in as few launches as a list of tensors takes."""
    powers = torch._foreach_pow(beta, counts)
    torch._foreach_neg_(powers)
    torch._foreach_add_(powers, 1)
    return powers


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic: themselves where they have it, else copies."""
    return [tensor.to(compute_dtype(tensor)) for tensor in tensors]


def _store(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write what was computed where it was not computed in place."""
    for tensor, value in zip(tensors, values, strict=True):
        if tensor is not value:
            tensor.copy_(value)


def _follow(keys: Sequence[Tensor | None], params: Sequence[Tensor], m: float | Tensor) -> None:
    """The EMA of the parameters that have a key."""
    pairs = [(key, param) for key, param in zip(keys, params, strict=True) if key is not None]
    momentum = m if isinstance(m, Tensor) else torch.tensor(m, dtype=torch.float64, device="cpu")
    ema_update_([key for key, _ in pairs], [param for _, param in pairs], momentum)


def _on_device(x: float | Tensor) -> bool:
    """Whether a number is known to the device only."""
    return isinstance(x, Tensor) and x.device.type != "cpu"
