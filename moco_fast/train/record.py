"""What a run writes down while it goes: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moco_fast.extras import extra
from moco_fast.files import write_text

METRICS_FILE = "metrics.jsonl"


class Recorder:
    """Appends one JSON object per record, and the same numbers to TensorBoard.

    Args:
        folder: the run folder, or None to record nothing.
        step: records after this step, left by a run that died past its last checkpoint, are dropped; at
            step 0 all there are.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._file: Any = None
        self._board: Any = None
        if folder is None:
            return
        path = folder / METRICS_FILE
        kept = (
            [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            if step and path.exists()
            else []
        )
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        tensorboard = extra("torch.utils.tensorboard")
        self._board = tensorboard.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, **values: Any) -> None:
        """Record values of a step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    """Step of a line; infinite for one that a crash cut short, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
