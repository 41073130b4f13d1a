"""What a run shows while it goes: a progress bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from moco_fast.data.images import Dataset
from moco_fast.distributed import world_size
from moco_fast.extras import extra

# What a record may hold: key, what it is called, format.
_SHOWN = (
    ("pos_sim", "similarity: positive", ".3f"),
    ("neg_sim", "negative", "+.3f"),
    ("spread", "spread", ".2f"),
    ("rank", "rank", ".1f"),
    ("queue_fill", "queue full", ".0%"),
    ("images_per_s", "images/s", ",.0f"),
    ("data_wait", "waiting for data", ".0%"),
)
QUIET_SECONDS = 15.0  # between lines, where there is no terminal


class Display:
    """Progress of a run.

    Args:
        console: a rich Console.
        total: steps of the whole run.
        done: steps that a resumed run has behind it.
        chance: loss of guessing, log(K + 1); None where the loss is no cross-entropy.
        task: what the bar is called.
    """

    def __init__(
        self, console: Any, total: int, done: int, chance: float | None, task: str = "pretraining"
    ) -> None:
        progress = extra("rich.progress")
        self._console, self._total, self._chance = console, total, chance
        self._first, self._began, self._last_line = done, time.monotonic(), 0.0
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=False),
            progress.TextColumn("\n{task.fields[status]}", markup=False),
            console=console,
            # A bar redrawn into a file is noise; lines are printed there instead.
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(task, total=total, completed=done, status="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Show the latest record."""
        chance = "" if self._chance is None else f" (chance {self._chance:.2f})"
        said = [f"loss {values['loss']:.3f}{chance}"]
        said += [f"{name} {values[key]:{form}}" for key, name, form in _SHOWN if key in values]
        status = "  ".join(said)
        self._bar.update(self._task, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > QUIET_SECONDS or step == self._total):
            self._last_line = now
            left = (now - self._began) / max(1, step - self._first) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {status}  {_clock(left)} left", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)


def opening(
    dataset: Dataset, images: int, what: str, device: torch.device, steps: int, batch_size: int, out: Path
) -> str:
    """The line that a run begins with: what is trained on how many images, where, and for how long."""
    where = f"{world_size()} processes, {device.type}" if world_size() > 1 else str(device)
    return (
        f"{dataset.name}: {images:,} images ({dataset.note}). {what} on {where}, {steps:,} steps of "
        f"{batch_size}. Run folder: {out}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
