"""Registration of ops with torch.library, with less between a caller and a kernel than its custom_op.

The wrappers of custom_op and its register_autograd take as long as a small kernel, in every call and on any
device. What they look for at run time, results that share memory with arguments, opcheck looks for in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("moco_fast", "FRAGMENT")


def op(
    name: str,
    *,
    mutates: Sequence[str] = (),
    save: Callable[..., None] | None = None,
    gradients: Callable[..., tuple] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the op ``moco_fast::name``, into which torch.compile does not look.

    Args:
        mutates: names of the arguments that it writes; autograd is told. Such an op returns nothing.
        save: ``save(ctx, arguments, results)`` after the forward pass; saves at least the arguments that the
            gradients depend on. An op without it has no gradient.
        gradients: ``gradients(ctx, saved, of_first)`` of all arguments, or None, from that of the first
            result, which alone has one. A second derivative raises.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _below_autograd(function), "CompositeExplicitAutograd")
        made = getattr(torch.ops.moco_fast, name).default
        if save and gradients:
            _LIBRARY.impl(name, _differentiable(made, save, gradients), "Autograd")
        if mutates:
            fake(made)(lambda *_: None)
            _LIBRARY.impl(name, _counting_versions(made, mutates), "ADInplaceOrView", with_keyset=True)
        return made

    return register


def fake(op: Any) -> Callable[[Callable[..., Any]], None]:
    """What an op returns, without data."""
    return partial(torch.library.register_fake, op.name(), lib=_LIBRARY)


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Nothing that it calls is recorded."""

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return call


def _counting_versions(op: Any, mutates: Sequence[str]) -> Callable[..., None]:
    """An op that counts its writes, in traces too: a gradient that needs the old values raises."""
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.name in mutates]

    def call(keys: Any, *arguments: Any) -> None:
        for i in written:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])
        op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return call


def _differentiable(
    op: Any, save: Callable[..., None], gradients: Callable[..., tuple]
) -> Callable[..., Any]:
    """An op with gradients."""
    undifferentiated = _below_autograd(op)

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = undifferentiated(*arguments)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # else autograd writes zeros in their place
        save(ctx, arguments, results)
        return results

    def backward(ctx: Any, of_first: Tensor | None, *_: None) -> Any:
        if of_first is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: hooks may unpack them, a checkpoint does so only once
        found = gradients(ctx, saved, of_first)
        if torch.is_grad_enabled():  # create_graph=True
            found = _DifferentiatedOnce.apply(len(found), *found, of_first, *saved)
        return found

    # Autograd names its nodes, in profiles and for anomalies, after the class.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op.name().split("::")[1], (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Any:
        # In forward mode too: autograd.Function raises where a tangent would be lost.
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        ):
            return function.apply(*arguments)
        return undifferentiated(*arguments)

    return call


class _DifferentiatedOnce(torch.autograd.Function):
    """The identity on gradients, which depend on the other tensors in a way that autograd does not know."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if gradient is None else gradient.clone() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("no second derivative: the gradient is that of an op, unknown to autograd")


def is_read_once(saved: Tensor) -> bool:
    """In a backward pass: whether nobody reads a saved tensor after it: no ``retain_graph``, no trace."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    return not kept and type(saved) is Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For an op's own matrix products, which stay in fp32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()
