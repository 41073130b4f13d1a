"""What a run writes down while it goes: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from moco_fast.distributed import from_rank_0
from moco_fast.evaluate.pictures import plot_curves
from moco_fast.extras import extra
from moco_fast.files import write_text

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"


class Recorder:
    """Appends one JSON object per record, and the same numbers to TensorBoard.

    Args:
        folder: the run folder, or None to record nothing.
        say: told, once each, of what cannot be written any more; the run goes on without it.
        step: records after this step, left by a run that died past its last checkpoint, are dropped; at
            step 0 all there are.
    """

    def __init__(self, folder: Path | None, step: int = 0, say: Callable[[str], object] = print) -> None:
        self._file: Any = None
        self._board: Any = None
        self._say = say
        self._step = step
        self._known: set[str] = set()  # names of the values that were recorded of that step
        if folder is None:
            return
        path = folder / METRICS_FILE
        before = path.read_text(encoding="utf-8", errors="replace") if step and path.exists() else ""
        kept = [line for line in before.splitlines() if _step_of(line) <= step]
        self._known.update(*(json.loads(line) for line in kept if _step_of(line) == step))
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        tensorboard = extra("torch.utils.tensorboard")
        self._board = tensorboard.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

    def last(self, name: str) -> int:
        """The step up to which a value need not be measured: that of the start, unless its value is missing;
        the same on all ranks, which call this."""
        return from_rank_0(self._step if self._step == 0 or name in self._known else self._step - 1)

    def write(self, step: int, **values: Any) -> None:
        """Record values of a step."""
        if self._file is not None:
            try:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                self._say(f"Step {step}: {self._file.name} gets no more records: {error}")
                with suppress(OSError):  # of the lines that it still holds, which Python 3.14 would print
                    self._file.close()
                self._file = None
        if self._board is not None:
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:
                self._say(f"Step {step}: TensorBoard gets no more records: {error}")
                self._board = None

    def close(self) -> None:
        """Flush and close both."""
        for part in (self._file, self._board):
            if part is not None:
                with suppress(OSError):
                    part.close()


def draw_curves(folder: Path, say: Callable[[str], object]) -> None:
    """Write ``curves.png`` of what was recorded; where that cannot be done the run has not failed."""
    try:
        plot_curves(folder / METRICS_FILE, folder / CURVES_FILE)
    except (OSError, ValueError) as error:
        say(f"No {CURVES_FILE}: {error}")


def _step_of(line: str) -> float:
    """Step of a line; infinite for one that a crash cut short, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
