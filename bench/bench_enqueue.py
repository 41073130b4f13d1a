"""enqueue_ of 256 raw keys of 128 features into 65536 slots, fp32.

8 bytes per feature: a key read, a row written. The official buffer is (C, K),
where one key is C strided writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Case, Peer, bind, relative, serving

SIZES, QUICK = [(256, 65536, 128)], [(8, 512, 32)]  # N, K, C
INDEX_COPY = "index_copy_"
PEERS = [NATIVE, REFERENCE, INDEX_COPY, OFFICIAL]
CPU = torch.device("cpu")

Run = Callable[[Tensor, Tensor, Tensor], None]  # queue (K, C), official (C, K); ptr (1,); keys (N, C)


def ours(backend: str) -> Run:
    def run(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
        with moco_fast.use_backend(backend):
            moco_fast.enqueue_(queue, ptr, keys)

    return run


@torch.no_grad()
def index_copy(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    index = (ptr + torch.arange(len(keys), device=ptr.device)) % len(queue)
    queue.index_copy_(0, index, F.normalize(keys, dim=1))
    ptr.copy_((ptr + len(keys)) % len(queue))


@torch.no_grad()
def official(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """The official slice assignment, which reads the pointer back and needs K % N == 0."""
    at, slots = int(ptr), queue.shape[1]
    queue[:, at : at + len(keys)] = F.normalize(keys, dim=1).T
    ptr[0] = (at + len(keys)) % slots


@cache
def case(size: tuple[int, int, int], device: torch.device = CPU) -> Case:
    """The case of one size, N, K and C."""
    n, k, c = size
    generator = torch.Generator().manual_seed(0)
    queue = F.normalize(torch.randn(k, c, generator=generator), dim=1).to(device)
    keys = torch.randn(n, c, generator=generator).to(device)
    start = k - n  # the last slots, then the pointer wraps
    want = queue.double()
    want[start:] = F.normalize(keys.double(), dim=1)

    def buffers(run: Run) -> tuple[Tensor, Tensor, Tensor]:
        rows = queue.t().contiguous() if run is official else queue.clone()
        return rows, torch.tensor([start], device=device), keys

    def errors(run: Run) -> dict[str, float]:
        rows, ptr, _ = inputs = buffers(run)
        run(*inputs)
        rows = rows.t() if run is official else rows
        untouched = torch.equal(rows[:start], queue[:start]) and int(ptr) == 0
        return {"rows": relative(rows[start:], want[start:]) if untouched else float("inf")}

    def peer(run: Run) -> Peer:
        return bind(run, errors, *buffers(run), tolerance=5e-7)

    backends, absent = serving("enqueue_", (queue, keys))
    runs = {f"{OURS} {backend}": ours(backend) for backend in backends}
    runs |= {INDEX_COPY: index_copy, OFFICIAL: official}
    peers = {name: peer(run) for name, run in runs.items()}
    return Case("enqueue_", f"N={n}, K={k}, C={c}", peers, 3.0 * n * c, 8.0 * n * c, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"N{size[0]}")
def test_enqueue(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
