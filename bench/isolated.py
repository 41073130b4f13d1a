"""Calls in processes of their own, several at a time, of which each may fail, or end its process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from queue import SimpleQueue

from bench.case import reason

LONGEST = 120.0  # seconds of a call: a kernel that waits for itself never ends


class Processes(AbstractContextManager):
    """``count`` processes that start when they are needed and end with the block."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._free: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        for _ in range(count):
            self._free.put(_process())

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._free.empty():
            self._free.get().shutdown()

    def errors(self, function: Callable, calls: list[tuple]) -> Iterator[str | None]:
        """What each call raised, in order, as they end; None for one that returned."""
        return self._threads.map(lambda arguments: self._error(function, arguments), calls)

    def _error(self, function: Callable, arguments: tuple) -> str | None:
        process = self._free.get()
        try:
            error = process.submit(_guarded, function, arguments).result(LONGEST)
        except BrokenProcessPool:
            error = "its process ended"
        except TimeoutError:
            error = f"it had not ended after {LONGEST:.0f} s"
            for hung in process._processes.values():  # which an executor can only wait for
                hung.kill()
        if error:  # a fault of the GPU, say, stays with the process that caused it
            process.shutdown(wait=False)
            process = _process()
        self._free.put(process)
        return error


def _process() -> ProcessPoolExecutor:
    """One process: where several share an executor, the end of one fails the calls of all."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _guarded(function: Callable, arguments: tuple) -> str | None:
    try:
        function(*arguments)
    except Exception as error:  # as text: not every exception of a compiler survives pickling
        return reason(error)
    return None
