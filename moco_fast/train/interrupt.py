"""Ending a run from outside: SIGTERM, SIGHUP and Ctrl-C are requests, answered between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

HANG_UP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # a terminal that was closed


class StopRequest:
    """While entered, SIGTERM, SIGHUP and the first Ctrl-C only set :attr:`signal`.

    A second Ctrl-C interrupts as usual. SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be handled
            for number in (signal.SIGTERM, signal.SIGINT, *HANG_UP):
                if number in HANG_UP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
