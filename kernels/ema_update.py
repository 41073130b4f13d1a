"""EMA of parameters, in place: target <- m * target + (1 - m) * source.

One launch for the whole model: every program walks one chunk of a table of
(state, source, copy, length) on the device, made once for a list of tensors and
kept. 12 bytes per fp32 parameter, the minimum: two reads, one write. With fp32
masters the state is the master, and the target gets a rounded copy.

Arithmetic in fp32 (fp64 for fp64 tensors) as round(m * t) + round((1 - m) * s), without fused
multiply-add: bitwise what torch gives for t * m + s * (1 - m).

Reference: moco_fast.reference.ema_update_.  Tests: tests/test_ema_update.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moco_fast import reference

# (elements per program, warps) by bytes per element of the state. Not measured on a GPU yet.
TILES = {8: (2048, 8), 4: (4096, 8), 2: (8192, 8)}

# Tables kept: one per model and momentum encoder, of 32 bytes per chunk.
TABLES = 8

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _chunk(
    state, source, copy, at, inside, keep, take, ARITHMETIC: tl.constexpr, HAS_COPY: tl.constexpr
):  # fmt: skip
    old = tl.load(state + at, mask=inside).to(ARITHMETIC)
    new = old * keep + tl.load(source + at, mask=inside).to(ARITHMETIC) * take
    tl.store(state + at, new.to(state.dtype.element_ty), mask=inside)
    if HAS_COPY:
        tl.store(copy + at, new.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _ema_update(
    table,  # (CHUNKS, 4) int64: addresses of state, source and copy, length
    m,  # () on the device, if M_ON_DEVICE
    keep, take,  # else m and 1 - m, in fp32
    STATE: tl.constexpr, SOURCE: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr,
    M_ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0).to(tl.int64) * 4
    state = tl.load(entry).to(tl.pointer_type(STATE))
    source = tl.load(entry + 1).to(tl.pointer_type(SOURCE))
    copy = tl.load(entry + 2).to(tl.pointer_type(COPY))
    length = tl.load(entry + 3)
    if ALIGNED:  # chunks are, where their tensors start on 16 bytes
        state = tl.multiple_of(state, 16)
        source = tl.multiple_of(source, 16)
        copy = tl.multiple_of(copy, 16)
    ARITHMETIC: tl.constexpr = tl.float64 if tl.float64 == STATE else tl.float32
    if M_ON_DEVICE:
        value = tl.load(m)
        keep = value.to(ARITHMETIC)
        take = (1 - value).to(ARITHMETIC)
    at = tl.arange(0, BLOCK)
    # Without a mask the loads are 16 bytes wide: no compiler knows what a length that was read divides.
    if length == BLOCK:
        _chunk(state, source, copy, at, None, keep, take, ARITHMETIC, HAS_COPY)
    else:
        _chunk(state, source, copy, at, at < length, keep, take, ARITHMETIC, HAS_COPY)


def _capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_captured: list[Tensor] = []  # a graph reads its table for as long as it lives, which nobody tells


@lru_cache(maxsize=TABLES)
def _table(
    addresses: tuple[tuple[int, int, int, int], ...],  # state, source, copy, elements of each tensor
    sizes: tuple[int, int, int],  # bytes per element of the three
    block: int,
    device: torch.device,
) -> Tensor:
    """Chunks of at most ``block`` elements, (CHUNKS, 4) on the device."""
    if _capturing(device):
        raise RuntimeError(
            "ema_update_ on the triton backend must run once on these tensors before it is captured in a "
            "CUDA graph: its first call copies their addresses to the GPU"
        )
    tensors = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    chunks = (tensors[:, 3] + block - 1) // block
    rows = torch.repeat_interleave(torch.arange(len(tensors), device="cpu"), chunks)
    starts = torch.arange(len(rows), device="cpu") - (chunks.cumsum(0) - chunks)[rows]
    table = tensors[rows]
    table[:, :3] += starts[:, None] * block * torch.tensor(sizes, device="cpu")
    table[:, 3] = (table[:, 3] - starts * block).clamp_max(block)
    return table.to(device)


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], m: Tensor, masters: Sequence[Tensor] = ()
) -> None:
    """See :func:`moco_fast.reference.ema_update_`."""
    states = masters or targets
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(zip(states, sources, targets, strict=True)):
        groups.setdefault(_kind(*row), []).append(i)
    for kind, members in groups.items():
        chosen = [[role[i] for i in members] for role in (states, sources, targets)]
        if kind == ():  # no kernel
            state, source, target = chosen
            reference.ema_update_(target, source, m, state if masters else ())
        else:
            _launch(*chosen, m, *kind)


def _kind(state: Tensor, source: Tensor, target: Tensor) -> tuple:
    """What one launch shares, (dtypes, aligned), or () where the reference has to do it."""
    row = (state, source, target)
    dense = all(t.is_contiguous() for t in row) or (
        state.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in row)
    )
    dtypes = tuple(t.dtype for t in row)
    mixed = torch.float64 in dtypes and len(set(dtypes)) > 1
    if not dense or mixed or not TRITON_DTYPES.keys() >= set(dtypes):
        return ()
    return dtypes, all(t.data_ptr() % 16 == 0 for t in row)


def _launch(
    states: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    m: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    aligned: bool,
    tiles: tuple[int, int] | None = None,
) -> None:
    block, warps = tiles or TILES[dtypes[0].itemsize]
    addresses = tuple(
        (state.data_ptr(), source.data_ptr(), copy.data_ptr(), state.numel())
        for state, source, copy in zip(states, sources, copies, strict=True)
    )
    device = states[0].device
    if dtypes[0] == torch.float64 and m.device != device and _capturing(device):
        raise RuntimeError(
            "ema_update_ on the triton backend takes m for float64 as a tensor on the GPU in a CUDA graph: a "
            "number has fp32 as an argument of a kernel, and cannot be copied while the graph is captured"
        )
    table = _table(addresses, tuple(dtype.itemsize for dtype in dtypes), block, device)  # type: ignore[arg-type]
    if len(table) == 0:
        return
    if _capturing(device):
        _captured.append(table)
    elif device.type == "cuda":  # it may leave the cache, which another stream has filled
        table.record_stream(torch.cuda.current_stream(device))
    if dtypes[0] == torch.float64:
        m = m.to(device)  # as an argument of a kernel a number has fp32
    on_device = m.device == device and (device.type == "cuda" or dtypes[0] == torch.float64)
    keep, take = (0.0, 0.0) if on_device else (float(m), float(1 - m))
    _ema_update[(len(table),)](
        table, m if on_device else table, keep, take,
        *(TRITON_DTYPES[dtype] for dtype in dtypes), HAS_COPY=states[0] is not copies[0],
        M_ON_DEVICE=on_device, ALIGNED=aligned, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


CANDIDATES = {
    size: [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16)]
    for size in TILES
}


def tune_case(size: int) -> Callable[[tuple], Callable[[], object]]:
    """What bench/tune.py times: 26 M parameters in 160 tensors."""
    dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[size]
    targets, sources = ([torch.randn(160_003, device="cuda").to(dtype) for _ in range(160)] for _ in range(2))
    m = torch.tensor(0.999, dtype=torch.float64)

    def make(tiles: tuple[int, int]) -> Callable[[], object]:
        aligned = all(t.data_ptr() % 16 == 0 for t in (*targets, *sources))
        return lambda: _launch(targets, sources, targets, m, (dtype, dtype, dtype), aligned, tiles)

    return make
