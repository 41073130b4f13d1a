"""take_rows of a batch of 256 images in another order: what packs it for an exchange between ranks.

2 bytes moved per byte of image. The formula is ``x[index]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Case, Peer, bind, serving

# N, C, H = W, dtype
SIZES = [(256, 3, 224, torch.uint8), (128, 1, 28, torch.float32)]
QUICK = [(8, 3, 9, torch.uint8)]
SELECT = "torch.index_select"
PEERS = [NATIVE, REFERENCE, SELECT, OFFICIAL]
CPU = torch.device("cpu")

Run = Callable[[Tensor, Tensor], Tensor]  # x (N, C, H, W), index (N,)


def ours(backend: str) -> Run:
    def run(x: Tensor, index: Tensor) -> Tensor:
        with moco_fast.use_backend(backend):
            return moco_fast.take_rows(x, index)

    return run


def official(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


def select(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


@cache
def case(size: tuple[int, int, int, torch.dtype], device: torch.device = CPU) -> Case:
    """The case of one size."""
    n, channels, side, dtype = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, channels, side, side), generator=generator).to(dtype).to(device)
    index = torch.randperm(n, generator=generator).to(device)

    def errors(run: Run) -> dict[str, float]:
        return {"rows": 0.0 if torch.equal(run(x, index), x[index]) else float("inf")}

    def peer(run: Run) -> Peer:
        return bind(run, errors, x, index, tolerance=0.0)

    backends, absent = serving("take_rows", (x, index))
    peers = {name: peer(run) for name, run in {f"{OURS} {b}": ours(b) for b in backends}.items()}
    peers |= {SELECT: peer(select), OFFICIAL: peer(official)}
    label = f"N={n}, {channels}x{side}x{side} {str(dtype).removeprefix('torch.')}"
    return Case("take_rows", label, peers, 0.0, 2.0 * x.numel() * x.element_size(), absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[2]}px")
def test_take_rows(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
