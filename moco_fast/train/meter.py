"""Metrics of steps, fetched from the device now and then; a run ends where they are not finite."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from moco_fast.data.loader import BatchLoader
from moco_fast.distributed import average_
from moco_fast.train import checkpoint as checkpoints


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite; the last checkpoint is from before."""


class Meter:
    """Gathers the metrics of steps on the device, and times them.

    Args:
        loader: whose waiting time is reported.
        batch_size: images per step, over all processes.
        out: run folder, which an error names.
    """

    def __init__(self, loader: BatchLoader, batch_size: int, out: Path) -> None:
        self._loader, self._batch_size, self._out = loader, batch_size, out
        self._pending: list[dict[str, Tensor]] = []
        self._waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin to time the next steps now: what came before was not training."""
        self._began = time.monotonic()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Note the metrics of a step, 0-d tensors, the same names every time; the loss is one of them."""
        self._pending.append(metrics)

    def fetch(
        self,
        step: int,  # the last that was added
    ) -> dict[str, float]:
        """Means over the steps since the last call, and their speed; empty if there were none.

        The only wait for the device.

        Raises:
            NonFiniteLossError: the loss of one of the steps is not finite; says which.
        """
        if not self._pending:
            return {}
        names = list(self._pending[0])
        metrics = torch.stack([torch.stack([found[name] for name in names]) for found in self._pending])
        average_(metrics)
        rows = metrics.cpu()
        first = step - len(rows) + 1
        self._pending.clear()
        losses = rows[:, names.index("loss")]
        finite = torch.isfinite(losses)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NonFiniteLossError(_explained(first + bad, f"loss: {losses[bad].item()}", self._out))
        now, waited = time.monotonic(), self._loader.wait_seconds
        values = dict(zip(names, rows.mean(0).tolist(), strict=True))
        values["images_per_s"] = len(rows) * self._batch_size / (now - self._began)
        values["data_wait"] = (waited - self._waited) / (now - self._began)
        self._began, self._waited = now, waited
        return values


def check_weights(model: nn.Module, step: int, out: Path) -> None:
    """Raise NonFiniteLossError if a weight or buffer is not finite after a step."""
    try:
        checkpoints.check_finite(model)
    except ValueError as error:
        raise NonFiniteLossError(_explained(step, f"weights: {error}", out)) from error


def _explained(step: int, what: str, out: Path) -> str:
    if (out / checkpoints.FILE_NAME).exists():
        rest = f"The last good checkpoint stays in {out}: resume it with a lower --lr."
    else:
        rest = "No checkpoint had been written yet."
    return (
        f"not finite at step {step} ({what}). Likely causes: lr too high, no warm-up, temperature too low, "
        f"or broken images. {rest}"
    )
