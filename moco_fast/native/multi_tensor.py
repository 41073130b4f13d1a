"""Ops over lists of tensors, on CPU and GPU: the EMA of parameters, and optimizers' steps fused with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moco_fast import reference
from moco_fast.kernels.backend import on_device_of
from moco_fast.native import compiled
from moco_fast.native.compiled import DTYPES, stream

# torch >= 2.10 lets the compiled module read a list of tensors in one pass.
_READS_TENSORS = (
    compiled._C is not None
    and hasattr(Tensor, "__dlpack_c_exchange_api__")
    and compiled._C.read_tensors_through(Tensor.__dlpack_c_exchange_api__)
)

# Device types as DLPack numbers them.
DEVICES = {"cpu": 1, "cuda": 2}


def pair_up(targets: list, sources: list) -> bool:
    """Whether both lists certainly hold floating-point tensors of pairwise equal shapes on one device.

    False may also mean that this cannot tell, so the caller looks for itself.
    """
    return (
        _READS_TENSORS and not torch.compiler.is_compiling() and compiled._C.tensors_pair_up(targets, sources)
    )


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor, masters: Sequence[Tensor] = ()
) -> None:
    """See :func:`moco_fast.reference.ema_update_`."""
    device = targets[0].device
    if m.is_cuda and device.type != "cuda":
        m = m.cpu()
    if m.is_cuda and m.dtype not in (torch.float32, torch.float64):
        m = m.double()
    roles = [list(targets), list(sources), *([list(masters)] if masters else [])]
    rows, rest = _rows(roles, device)
    if rest:
        left, taken, *averages = _take(roles, rest)
        reference.ema_update_(left, taken, m, *averages)
    with on_device_of(targets[0]):
        compiled._C.ema_update(rows, _scalar(m), torch.get_num_threads(), stream(device))


def _rows(
    roles: list[list],  # of tensors or None, one list per role
    device: torch.device,
    *,
    uniform: bool = False,
    steps: list[Tensor] | None = None,  # one more role, of 0-d float32 tensors
) -> tuple[Any, list[int]]:
    """Addresses of tensors that belong together, row by row, and the indices of rows without a kernel.

    A kernel takes tensors that each fill one stretch of memory, in the same order, of dtypes that mix:
    float64 with float64 only, or one dtype for all if ``uniform``.
    """
    where = DEVICES[device.type], device.index or 0
    if _READS_TENSORS:
        return compiled._C.read_tensors(roles, uniform, *where, steps)
    good: list[int] = []
    rest: list[int] = []
    for i, row in enumerate(zip(*roles, strict=True)):
        (good if _fits([t for t in row if t is not None], device, uniform) else rest).append(i)
    kept = _take(roles if steps is None else [*roles, steps], good)
    addresses = [[0 if t is None else t.data_ptr() for t in role] for role in kept]
    dtypes = [[0 if t is None else DTYPES[t.dtype] for t in role] for role in kept]
    return compiled._C.Rows(addresses, [t.numel() for t in kept[0]], dtypes, *where), rest


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | list[None],
    keys: list[Tensor | None],
    lr: float | Tensor,
    m: float | Tensor,
    step: reference.SgdStep,
) -> None:
    """See :func:`moco_fast.reference.sgd_`."""
    device = params[0].device
    roles: list[list] = [params, grads, buffers, keys]
    rows, rest = _rows(roles, device, uniform=True)
    if rest:
        left, with_grads, with_buffers, with_keys = _take(roles, rest)
        reference.sgd_(left, with_grads, with_buffers, with_keys, lr, m, step)
    scratch = torch.empty(
        compiled._C.sgd_scratch(rows) if step.trust else 0, dtype=torch.float64, device=device
    )
    with on_device_of(params[0]):
        compiled._C.sgd_step(
            rows, tuple(step), _scalar(lr), _scalar(m), scratch.data_ptr(),
            torch.get_num_threads(), stream(device),
        )  # fmt: skip


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    keys: list[Tensor | None],
    lr: float | Tensor,
    m: float | Tensor,
    step: reference.AdamwStep,
) -> None:
    """See :func:`moco_fast.reference.adamw_`."""
    device = params[0].device
    roles: list[list] = [params, grads, averages, squares, keys]
    rows, rest = _rows(roles, device, uniform=True, steps=steps)
    if rest:
        left, with_grads, means, spreads, with_keys, counts = _take([*roles, steps], rest)
        reference.adamw_(left, with_grads, means, spreads, counts, with_keys, lr, m, step)
    with on_device_of(params[0]):
        compiled._C.adamw_step(
            rows, tuple(step), _scalar(lr), _scalar(m), torch.get_num_threads(), stream(device)
        )


def _fits(tensors: list[Tensor], device: torch.device, uniform: bool) -> bool:
    """Whether a kernel takes these tensors together."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        dtypes <= DTYPES.keys()
        and (len(dtypes) == 1 or not (uniform or torch.float64 in dtypes))
        and all(tensor.device == device and tensor.shape == tensors[0].shape for tensor in tensors)
        and (
            all(tensor.is_contiguous() for tensor in tensors)
            or (
                tensors[0].ndim == 4
                and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
            )
        )
    )


def _take(roles: list[list], indices: list[int]) -> list[list]:
    """The given rows of every role."""
    return [[role[i] for i in indices] for role in roles]


def _scalar(x: float | Tensor) -> tuple[float, int, int]:
    """A number as the kernels take it: its value, or where it is on a GPU and as which dtype."""
    if isinstance(x, Tensor) and x.is_cuda:
        return 0.0, x.data_ptr(), DTYPES[x.dtype]
    return float(x), 0, DTYPES[torch.float64]
