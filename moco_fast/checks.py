"""Checks of arguments, of every kind; those of one op are in ops/arguments.py.

A bad argument raises ValueError or TypeError that names it, shows its value
and says what was expected, before anything is changed. No check reads device
data, so none synchronises; :func:`finite` does, and is called on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

PRECISIONS = ("highest", "high", "medium")
REDUCTIONS = ("mean", "sum", "none")
FINITE_PART = 2**26  # values that finite() looks at in one go: what is checked may fill most of the memory


def tensor(name: str, value: object, *, ndim: int) -> Tensor:
    """Return ``value`` as a floating-point tensor with ``ndim`` dimensions, or raise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def one_gradient(reduction: str, wanted: bool) -> None:
    """Raise for losses one by one where a gradient is wanted that was summed over all of them."""
    if wanted and reduction == "none":
        raise ValueError(
            "reduction must be 'mean' or 'sum' where a gradient is wanted, got 'none': every row's gradient "
            "mixes all losses; for the losses alone call it under torch.no_grad()"
        )


def number(name: str, value: object) -> float:
    """Return ``value`` as a float, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, Real):  # as NumPy's are
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return float(value)


def not_negative(name: str, value: object) -> float:
    """Return ``value`` as a float that is finite and at least 0, or raise."""
    result = number(name, value)
    if not 0 <= result < math.inf:  # NaN fails too
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return result


def count(name: str, value: object, least: int = 1) -> int:
    """Return ``value`` as an int if it is an integer of at least ``least``, or raise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    """Return ``values`` as so many finite floats, or raise."""
    if not isinstance(values, Sequence) or any(
        isinstance(v, bool) or not isinstance(v, Real) for v in values
    ):
        raise TypeError(f"{name} must be made of numbers, got {values!r}")
    if len(values) != count or not all(-math.inf < v < math.inf for v in values):  # NaN fails too
        raise ValueError(f"{name} must have {count} finite value(s), got {values!r}")
    return tuple(float(v) for v in values)


def statistics(mean: object, std: object, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of every channel, the latter above 0, or raise."""
    means, stds = numbers("mean", mean, channels), numbers("std", std, channels)
    if min(stds) <= 0:
        raise ValueError(f"std must be above 0, got {std!r}")
    return means, stds


def images(value: object) -> Tensor:
    """Return ``value`` as a batch of uint8 images, gray or of three channels, or raise."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        raise TypeError(f"images must be a uint8 tensor, got {getattr(value, 'dtype', type(value))}")
    if value.ndim != 4 or value.shape[1] not in (1, 3) or value.numel() == 0:
        raise ValueError(
            f"images must be (N, C, H, W), C 1 or 3, and not empty, got shape {tuple(value.shape)}"
        )
    return value


def views(dtype: object, memory_format: object) -> None:
    """Raise unless images can be of this dtype and memory format."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise TypeError(
            f"memory_format must be torch.contiguous_format or torch.channels_last, got {memory_format}"
        )


def seed(value: object) -> int:
    """Return ``value`` if it is a seed that a torch.Generator takes and a signed integer holds, or raise."""
    result = count("seed", value, least=0)
    if result >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {result}")
    return result


def temperature(name: str, value: object) -> float:
    """Return a temperature as a float: finite and above zero, with a reciprocal that fp32 holds."""
    result = number(name, value)
    if not torch.finfo(torch.float32).tiny <= result < math.inf:  # NaN fails too
        detail = " whose reciprocal overflows fp32" if 0 < result < 1 else ""
        raise ValueError(f"{name} must be finite and above 0, got {value!r}{detail}")
    return result


def fraction(name: str, value: object) -> float:
    """Return ``value`` as a float in [0, 1], or raise."""
    result = number(name, value)
    if not 0 <= result <= 1:  # NaN fails too
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return result


def scalar_tensor(name: str, value: Tensor, beside_name: str, beside: Tensor) -> None:
    """Raise unless ``value`` is a 0-d floating-point tensor on the CPU or beside the tensors it scales."""
    if value.ndim != 0 or not value.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be a number or a 0-d floating-point tensor, got {value.dtype} {tuple(value.shape)}"
        )
    if value.device.type != "cpu":
        same_device(beside_name, beside, name, value)


def same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if first.device != value.device:
        raise ValueError(
            f"{name} is on {value.device}, but {first_name} is on {first.device}: move one of them"
        )


def per_row(name: str, value: object, beside_name: str, beside: Tensor) -> Tensor:
    """Return ``value`` as int64 numbers, one for each row of another tensor and on its device, or raise."""
    value = index(name, value)
    if value.shape != beside.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({beside.shape[0]},), one for each row of {beside_name}, "
            f"got {tuple(value.shape)}"
        )
    same_device(beside_name, beside, name, value)
    return value


def in_range(name: str, value: Tensor, end: int, start: int = 0, *, wait: bool = False) -> None:
    """Raise unless all numbers are in [start, end).

    Without ``wait`` only where looking costs no wait: on a CPU, not compiled.
    """
    if value.numel() == 0 or not (wait or (value.device.type == "cpu" and not torch.compiler.is_compiling())):
        return
    least, most = map(int, value.aminmax())
    if not start <= least <= most < end:
        raise ValueError(f"{name} must be in [{start}, {end}), got {least} to {most}")


def finite(**tensors: Tensor) -> None:
    """Raise ValueError if a tensor holds NaN or infinity, naming it and its first bad row.

    Reads the data, so it waits for the device. No op calls it.

    Example:
        >>> moco_fast.checks.finite(q=q, queue=queue)
    """
    for name, value in tensors.items():
        if not all(part.isfinite().all() for part in value.flatten().split(FINITE_PART)):
            bad = ~torch.isfinite(value)
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{name} must be finite, got {int(bad.sum())} non-finite of {value.numel()} values, "
                f"the first at {first}: {value[first].item()}"
            )


def index(name: str, value: object) -> Tensor:
    """Return ``value`` as row numbers, int64 of one dimension, or raise."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor of one dimension, got {shown}")
    return value


def same_shape(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Raise unless both tensors have one shape."""
    if value.shape != first.shape:
        raise ValueError(
            f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(value.shape)}"
        )
