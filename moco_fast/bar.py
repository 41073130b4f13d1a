"""A progress bar with the time that is left: in a terminal drawn, elsewhere a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # between lines, where there is no terminal


class Bar:
    """Progress of something that takes ``total`` units.

    Args:
        console: where to show it.
        total: units.
        unit: what they are called.
    """

    def __init__(self, console: Console, total: int, unit: str) -> None:
        self._console, self._total, self._unit = console, total, unit
        self._done, self._began, self._last_line = 0, time.monotonic(), time.monotonic()
        self._name = ""
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} " + unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def now(self, name: str) -> None:
        """Say what is being done."""
        self._name = name
        self._bar.update(self._task, description=name)

    def advance(self) -> None:
        """One unit is done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > QUIET_SECONDS:
            self._last_line = now
            left = (now - self._began) / self._done * (self._total - self._done)
            text = f"{self._name}: {self._done}/{self._total} {self._unit}, {left:.0f} s left"
            self._console.print(text, highlight=False)
