"""SGD, AdamW and LARS whose step also updates the key encoder, in the same pass over memory.

A MoCo step writes every query parameter in the optimizer, and reads it again to
move its key parameter. Here the step does both: 28 instead of 32 bytes per
fp32 parameter for SGD with momentum, and one launch on a GPU instead of two
per parameter group.

    >>> model = moco_fast.MoCo(...)
    >>> optimizer = moco_fast.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4,
    ...                           ema=model.move_ema_into_step(), m=model.m)

Without ``ema`` they are plain optimizers. Arguments and state dicts are those of
``torch.optim``, whose checkpoints they load and which loads theirs. Of parameters
sharded by FSDP2 a rank updates its shards. Under ``torch.compile`` a step breaks the
graph and runs as it is; a CUDA graph can hold every step but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moco_fast import backends, checks, ops, reference
from moco_fast.distributed import local_shards
from moco_fast.ops import arguments


class _EMAOptimizer(torch.optim.Optimizer):
    """What the optimizers share: gathering, checking, and the EMA of parameters they do not update."""

    op = "sgd_"  # the name of the step among the backends'
    unsupported: tuple[str, ...] = ("differentiable",)  # options of torch.optim that would change the result

    m: float | Tensor
    """Momentum of the next EMA, which the next forward pass sees; set it before ``step`` to schedule it."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        ema: Iterable[tuple[Tensor, Tensor]],
        m: float | Tensor,
    ) -> None:
        super().__init__(params, defaults)
        self.m = m
        self._keys: dict[Tensor, Tensor] = {}  # by query
        pairs = list(ema)
        if not isinstance(m, Tensor):
            checks.momentum(m)
        try:
            arguments.ema_update(
                local_shards(key for key, _ in pairs), local_shards(query for _, query in pairs)
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"ema holds pairs (key, query), its targets and sources: {error}") from None
        for i, (key, query) in enumerate(pairs):
            if query in self._keys:
                raise ValueError(f"ema[{i}] names a query parameter that has a key already")
            self._keys[query] = key

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"m": self.m, "_keys": self._keys}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults  # a copy of an optimizer, or a loaded state dict
        for group in state["param_groups"]:
            for name, value in defaults.items():
                group.setdefault(name, value)
            self._check(group)
        super().__setstate__(state)
        # As the parameters lie: a contiguous model's state meets no kernel beside channels_last weights.
        for param, held in self.state.items():
            for name, value in held.items():
                same = getattr(value, "shape", ()) == getattr(param, "shape", None)
                if same and value.stride() != param.stride():
                    held[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked; see :meth:`torch.optim.Optimizer.add_param_group`."""
        self._check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient, and all keys.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a sparse gradient; a first step while a CUDA graph is captured.
            TypeError, ValueError: an option, or ``m``, out of range, named. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        queries = list(self._keys)
        self._check_scalar("m", self.m, queries)
        work = []
        for group in self.param_groups:
            self._check(group)
            params = [param for param in group["params"] if param.grad is not None]
            self._check_scalar("lr", group["lr"], params)
            if any(param.grad.is_sparse for param in params):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if params:
                work.append((group, params))

        left = dict(self._keys)
        for group, params in work:
            in_step = self._keys_in_step(params)
            keys = [left.pop(param, None) if in_step else None for param in params]
            torch.autograd.graph.increment_version(
                local_shards([*params, *(key for key in keys if key is not None)])
            )
            self._update(group, params, [param.grad for param in params], keys)
        if left:
            ops.ema_update_(local_shards(left.values()), local_shards(left), self.m)
        return loss

    def _keys_in_step(self, params: list[Tensor]) -> bool:
        """Whether keys move in the pass over the parameters, which a step in plain PyTorch does not have.

        The EMA is then one of its own, in a kernel where there is one.
        """
        first = local_shards(params[:1])
        plain = backends.choose(self.op, first) is reference
        return not plain or backends.choose("ema_update_", first) is reference

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], keys: list[Tensor | None]
    ) -> None:
        raise NotImplementedError

    def _check(self, group: dict[str, Any]) -> None:
        """Raise if an option of a group is out of range or not supported."""
        if not isinstance(group["lr"], Tensor):
            checks.not_negative("lr", group["lr"])
        checks.not_negative("weight_decay", group["weight_decay"])
        for name in self.unsupported:
            if group.get(name):
                raise ValueError(f"{name} must be False, got {group[name]!r}: {type(self).__name__} lacks it")

    @staticmethod
    def _check_scalar(name: str, value: float | Tensor, beside: list[Tensor]) -> None:
        if isinstance(value, Tensor):
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} as a tensor must be float32 or float64, got {value.dtype}")
            if beside:
                checks.scalar_tensor(name, value, "the parameters", beside[0])
        elif name == "m":
            checks.momentum(value)


class SGD(_EMAOptimizer):
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


class LARS(_EMAOptimizer):
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


class AdamW(_EMAOptimizer):
    """``torch.optim.AdamW`` with the key encoder's EMA in its step.

    Formula: :func:`moco_fast.reference.adamw_`; equal to torch's to a few units in the last place.
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
                _refuse_capture(param)
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


def _sgd_step(
    optimizer: _EMAOptimizer,
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
                _refuse_capture(params[i])
                states[i][buffer_name] = torch.empty_like(params[i], memory_format=torch.preserve_format)
        buffers = local_shards(states[i][buffer_name] for i in rows)
        chosen, with_grads = local_shards(chosen), local_shards(with_grads)
        with_keys = local_shards(with_keys)
        torch.autograd.graph.increment_version(buffers)
        backends.choose("sgd_", chosen[:1]).sgd_(
            chosen, with_grads, buffers, with_keys, lr, optimizer.m, numbers._replace(first=first)
        )


def _refuse_capture(param: Tensor) -> None:
    """Raise where a first step would become part of a CUDA graph, and every replay a first step."""
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first step makes the optimizer's state: take it before capturing a CUDA graph"
        )
