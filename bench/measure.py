"""How the benchmarks measure time: interleaved, from a cold cache.

Machines that run this are shared and change their clock. Timing one peer after
the other would compare different minutes, so a round calls every peer once, in
an order that rotates, and rounds repeat. Before each call a buffer larger than
the last cache is rewritten: in training an encoder runs between two calls, and
nothing of the queue or of the parameters is left in cache. What a GPU is timed
in beyond that is in ``bench/cuda.py``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bench import cuda
from bench.case import Absent, Case

LEAST_ROUNDS = 7
COLD = cuda.COLD  # the mode that every device has

Timer = Callable[[], float]  # calls once and returns the seconds of it
Key = TypeVar("Key", bound=Hashable)


def use_threads() -> int:
    """Set and return the threads of every benchmark: two, or one if the CPUs or OMP_NUM_THREADS say so."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return torch.get_num_threads()


def flush_cache() -> None:
    """Evict everything from the CPU's caches by rewriting twice the size of the last one."""
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


def timers(run: Callable[[], object], device: torch.device) -> tuple[dict[str, Timer], str | None]:
    """Timers of a call by mode, :data:`COLD` first, and why a CUDA graph cannot hold it, if it cannot."""
    return cuda.timers(run, device) if device.type == "cuda" else ({COLD: wall_clock(run)}, None)


def wall_clock(run: Callable[[], object]) -> Timer:
    """A timer of a call on the CPU, from a cold cache."""

    def timer() -> float:
        flush_cache()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return timer


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
    timers: Mapping[Key, Timer],
    seconds: float,
    progress: Callable[[float], object] = lambda fraction: None,
) -> dict[Key, list[float]]:
    """Use every timer once per round, for about ``seconds`` and at least :data:`LEAST_ROUNDS` rounds.

    Args:
        timers: by name.
        seconds: how long to keep starting rounds.
        progress: told the fraction done after each round.

    Returns:
        Seconds of each call, by name, one figure per round; a first round is thrown away.
    """
    names = list(timers)
    times: dict[Key, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), -1
    with _no_gc():
        while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
            turn = rounds % len(names)
            for name in names[turn:] + names[:turn]:
                elapsed = timers[name]()
                if rounds >= 0:
                    times[name].append(elapsed)
            rounds += 1
            progress(min(rounds / LEAST_ROUNDS, (time.perf_counter() - start) / seconds, 1.0))
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile in milliseconds."""
    figures = np.percentile(times, [20, 50, 80]) * 1e3
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), map(float, figures), strict=True))


def time_with_pytest(benchmark, case: Case, name: str) -> None:
    """Check one peer, then time it on the CPU with pytest-benchmark, from a cold cache like the report."""
    import pytest

    if reason := case.absent.get(name):
        pytest.skip(f"{name}: {reason}")
    try:
        benchmark.extra_info.update(case.check(name))
    except Absent as reason:
        pytest.skip(f"{name}: {reason}")
    benchmark.pedantic(case.peers[name].run, setup=flush_cache, rounds=LEAST_ROUNDS, warmup_rounds=1)
