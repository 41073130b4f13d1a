"""Tensors of known shape whose values are computed only if an operation needs them.

A :class:`Lazy` answers a few operations from what it stands for. Any other one gets the true values: an
operation called from Python through ``__torch_function__``, with autograd; one called from C++, as autograd
does, through ``__torch_dispatch__``, below autograd.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_noted = False
_OURS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, os.path.dirname(__file__)))


def note(operation: str) -> None:
    """Say, once per process, which operation needs true logits, and where it was called."""
    global _noted
    if _noted:
        return
    _noted = True
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"moco_fast.compat: {operation} needs the true logits, (N, 1 + K), which are now computed. "
        "topk goes without, as does cross_entropy without options, with the labels that the model returned. "
        "Said once.",
        stacklevel=level,
    )


def getter(attribute: str) -> Any:
    """What ``__torch_function__`` is called with for an attribute."""
    return getattr(Tensor, attribute).__get__


# What needs no values; the rest of it is answered below autograd.
PLAIN: set[Any] = {
    *map(getter, ("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes")),
    *map(getter, ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    *map(getter, ("requires_grad", "grad_fn", "is_leaf", "grad")),
    Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.__hash__,
    Tensor.is_floating_point, Tensor.is_contiguous, Tensor.register_hook, Tensor.retain_grad,
    Tensor.backward, torch.autograd.backward, torch.autograd.grad,
    Tensor.expand_as,  # of another tensor, to this one's shape
}  # fmt: skip


class Lazy(Tensor):
    """Base of matrices without storage."""

    FUSED: ClassVar[dict[Any, str]] = {}
    """Methods that may answer a function, or return NotImplemented."""

    PLAIN: ClassVar[set[Any]] = PLAIN

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        column_major: bool = False,
    ) -> Any:
        strides = (1, shape[0]) if column_major else (shape[1], 1)
        return Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)

    def plain(self) -> Tensor:
        """The values, without autograd."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The tensor that this one stands for, with its gradient."""
        raise NotImplementedError

    @classmethod
    @torch.compiler.disable  # a compiled caller breaks its graph here, and calls the operation itself
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        first = args[0] if args else None
        if isinstance(first, Lazy) and func in first.FUSED:
            result = getattr(first, first.FUSED[func])(*args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        plain = first.PLAIN if isinstance(first, Lazy) else PLAIN
        if func in plain or isinstance(func, torch._ops.OpOverload):  # which a dispatch mode calls
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        note(getattr(func, "__name__", str(func)))
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.dense(), (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        note(str(func))
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.plain(), (args, kwargs or {}))
        return func(*args, **kwargs)
