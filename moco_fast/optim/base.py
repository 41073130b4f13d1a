"""What the optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moco_fast import backends, checks, ops, reference
from moco_fast.distributed import local_shards
from moco_fast.ops import arguments


class EMAOptimizer(torch.optim.Optimizer):
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
            checks.fraction("m", m)
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
        served = backends.choose(self.op, first) is not reference
        return served or backends.choose("ema_update_", first) is reference

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
            checks.fraction("m", value)


def refuse_capture(param: Tensor) -> None:
    """Raise where a first step would become part of a CUDA graph, and every replay a first step."""
    if param.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first step makes the optimizer's state: take it before capturing a CUDA graph"
        )
