"""How the benchmarks measure time: interleaved, from a cold cache, beside a roofline of the same run.

The CPUs that run this are shared and change their clock. Timing one peer after
the other would compare different minutes, so a round calls every peer once, in
an order that rotates, and rounds repeat. Before each call a buffer larger than
the last cache is rewritten: in training an encoder runs between two calls, and
nothing of the queue or of the parameters is left in cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.case import Case
from moco_fast import native

LEAST_ROUNDS = 7


def use_threads() -> int:
    """Set and return the threads of every benchmark: two, or one if the CPUs or OMP_NUM_THREADS say so."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return torch.get_num_threads()


def flush_cache() -> None:
    """Evict everything from the caches by rewriting twice the size of the last one."""
    _flush_buffer().add_(1)


@cache
def _flush_buffer() -> Tensor:
    return torch.zeros(2 * _last_cache_bytes() // 4)


def _last_cache_bytes() -> int:
    """Size of the last-level cache as Linux reports it; 64 MB where it does not."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    known = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in {"K", "M"}]
    return max(known, default=64 * 2**20)


@contextmanager
def _no_gc():
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    progress: Callable[[float], object] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Time every call once per round, for about ``seconds`` and at least :data:`LEAST_ROUNDS` rounds.

    Args:
        runs: what to time, by name.
        seconds: how long to go on starting rounds.
        progress: told the fraction done after each round.

    Returns:
        Seconds of each call, by name, one figure per round; a first round is thrown away.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), -1
    with _no_gc():
        while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                flush_cache()
                begin = time.perf_counter()
                runs[name]()
                elapsed = time.perf_counter() - begin
                if rounds >= 0:
                    times[name].append(elapsed)
            rounds += 1
            progress(min(rounds / LEAST_ROUNDS, (time.perf_counter() - start) / seconds, 1.0))
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = np.percentile(times, [20, 50, 80])
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Roofline:
    """What this machine reached in this run: the best of all tries, since a roof is a maximum."""

    copy: float  # bytes per second, read plus written
    products: dict[str, float]  # FLOP per second of torch.mm, by operand type

    def raised_by(self, other: Roofline) -> Roofline:
        """The higher of two roofs in every figure: a busy moment must not lower it."""
        products = {name: max(rate, other.products[name]) for name, rate in self.products.items()}
        return Roofline(max(self.copy, other.copy), products)

    def share(self, flops: float, nbytes: float, product: str, seconds: float) -> float:
        """``max(flops / rate, bytes / bandwidth) / seconds``: 1 is as fast as the roof allows."""
        return max(flops / self.products[product], nbytes / self.copy) / seconds


def roofline(quick: bool) -> Roofline:
    """Measure the copy bandwidth of a large tensor and the rate of a 2048^3 matrix product."""
    tries, numel, side = (3, 2**20, 256) if quick else (8, 2**26, 2048)
    source, target = torch.ones(numel), torch.ones(numel)
    copy = 2 * 4 * numel / _best(lambda: target.copy_(source), tries)

    a, b = torch.randn(side, side), torch.randn(side, side)
    products = {"fp32": 2 * side**3 / _best(lambda: torch.mm(a, b), tries)}
    if native.has_bf16_units():
        low_a, low_b = a.bfloat16(), b.bfloat16()
        products["bf16"] = 2 * side**3 / _best(lambda: torch.mm(low_a, low_b), tries)
    return Roofline(copy, products)


def _best(run: Callable[[], object], tries: int) -> float:
    run()
    best = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def time_with_pytest(benchmark, case: Case, name: str) -> None:
    """Check one peer, then time it with pytest-benchmark, from a cold cache like the report."""
    import pytest

    if reason := case.absent.get(name):
        pytest.skip(f"{name}: {reason}")
    benchmark.extra_info.update(case.check(name))
    benchmark.pedantic(case.peers[name].run, setup=flush_cache, rounds=LEAST_ROUNDS, warmup_rounds=1)
