"""Word from every process that it is there: a machine without power or network closes no connection.

Each process writes beats into the store that all met at. Rank 0 reads those of all and says whose have
stopped; the others watch rank 0's and what it says. A call to a store whose machine is silent may never
return, whatever its timeout: a second thread notices that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from moco_fast.distributed import name_ranks

INTERVAL = 4.0  # seconds between beats
# Intervals without a new beat, or an answer of the store, after which they count as gone. Not seconds: a
# process that was suspended itself, with all others or alone, knows nothing of the time between.
MISSED = 10

STORE_GONE = "the store that ranks meet at, or the machine that holds it, does not answer"
_SILENT = "silent"


class Heartbeat:
    """The beats of this process, and an ear for those of others, from ``start`` to ``stop``."""

    def __init__(
        self,
        store: Any,  # torch.distributed.Store
        rank: int,
        size: int,
        end: Callable[[str], None],  # called with who is gone, from another thread
    ) -> None:
        self._store = store.clone()  # that of the main thread may be waiting in a call
        self._rank, self._end = rank, end
        self._own, self._watched = 0, range(size) if rank == 0 else range(1)
        self._last, self._missed = [b""] * len(self._watched), [0] * len(self._watched)
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"moco_fast {run.__name__}", daemon=True)
            for run in (self._beat_on, self._watch_store)
        ]

    def start(self) -> None:
        """Write the first beat and start the thread."""
        self._store.set(_beat(self._rank), "0")
        if self._rank == 0:
            self._store.set(_SILENT, "")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No further beat, and no call of ``end`` but one under way."""
        self._stopped.set()
        # One that is inside a call of the store when Python ends would abort the process.
        for thread in self._threads:
            thread.join(INTERVAL)

    def _beat_on(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                who = self._exchange()
            except (RuntimeError, OSError):
                who = STORE_GONE
            if who:
                # The end of a run looks alike to those who hear of it last: they have until the next beat.
                self._stopped.wait(INTERVAL)
                self._finish(who)

    def _watch_store(self) -> None:
        seen, unanswered = 0, 0
        while not self._stopped.wait(INTERVAL):
            seen, unanswered = self._own, unanswered + 1 if self._own == seen else 0
            if unanswered >= MISSED:
                self._finish(STORE_GONE)

    def _finish(self, who: str) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._end(who)

    def _exchange(self) -> str:
        """One beat; who is gone, or nothing."""
        self._store.set(_beat(self._rank), str(self._own + 1))
        *beats, said = self._store.multi_get([*map(_beat, self._watched), _SILENT])
        self._own += 1
        pairs = zip(beats, self._last, self._missed, strict=True)
        self._missed = [0 if new != old else missed + 1 for new, old, missed in pairs]
        self._last = beats
        if said or max(self._missed) < MISSED:
            return said.decode()
        # Beats of a machine end together but for their phase.
        gone = died([rank for rank, n in zip(self._watched, self._missed, strict=True) if 2 * n >= MISSED])
        if self._rank == 0:
            self._store.set(_SILENT, gone)
        return gone


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def silent(store: Any) -> str:
    """Who has been found gone so far, or nothing."""
    return store.get(_SILENT).decode() if store.check([_SILENT]) else ""


def died(ranks: list[int]) -> str:
    """Word of ranks that say nothing."""
    return f"{name_ranks(ranks)} died or stopped answering"
