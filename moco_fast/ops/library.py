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

LIBRARY = torch.library.Library("moco_fast", "FRAGMENT")


def op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the op ``moco_fast::name``, into which torch.compile does not look.

    Args:
        mutates: names of the arguments that it writes, unseen by autograd.
    """

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.moco_fast, name).default

    return register


def fake(op: Any) -> Callable[[Callable[..., Any]], None]:
    """What an op returns, without data."""
    return partial(torch.library.register_fake, op.name(), lib=LIBRARY)


def differentiable(op: Any, save: Callable[..., None], gradients: Callable[..., tuple]) -> None:
    """Give an op a gradient, which can be differentiated once; a second derivative raises.

    Args:
        save: ``save(ctx, arguments, results)`` after the forward pass; saves at least the arguments that the
            gradients depend on.
        gradients: ``gradients(ctx, *of_results)`` for every argument; None for what has none, on both sides.
    """
    below_autograd = torch._C._AutoDispatchBelowAutograd

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with below_autograd():
                results = op(*arguments)
            ctx.set_materialize_grads(False)  # else autograd writes zeros for results that nobody used
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *of_results: Any) -> Any:
            if all(gradient is None for gradient in of_results):
                return (None,) * len(ctx.needs_input_grad)
            found = gradients(ctx, *of_results)
            if torch.is_grad_enabled():  # create_graph=True
                found = _DifferentiatedOnce.apply(len(found), *found, *of_results, *ctx.saved_tensors)
            return found

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return Differentiable.apply(*arguments)
        with below_autograd():
            return op(*arguments)

    LIBRARY.impl(op.name(), call, "Autograd")


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient found in the forward pass, for losses that arrive at autograd with ``scale``."""
    return (scale * gradient).to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where an op multiplies matrices in fp32 of its own."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


class _DifferentiatedOnce(torch.autograd.Function):
    """The identity on gradients, which depend on the other tensors in a way that autograd does not know."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        return tuple(None if gradient is None else gradient.clone() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("no second derivative: the gradient was computed by a kernel, not by autograd")
