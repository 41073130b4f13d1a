"""Checkpoints: written whole or not at all, read with ``weights_only=True``.

The layout is the official one, ``{epoch, arch, state_dict, optimizer}`` with
DDP's ``module.`` prefix, so scripts made for those files read these. What they
do not know of stands under ``moco_fast``.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco_fast import __version__, checks

FILE_NAME = "checkpoint.pth"
PREFIX = "module."
OFFICIAL_KEYS = ("epoch", "arch", "state_dict", "optimizer")


class CheckpointError(ValueError):
    """A file that is not a checkpoint this version can use; the message says what was expected."""


def write_atomic(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write beside the file, flush to the disk, then rename over it.

    Whenever the process dies, ``path`` holds the previous checkpoint or this one, whole.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({_first_line(error)}); the one before is kept"
        ) from error
    os.replace(aside, path)
    directory = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: str | os.PathLike[str], keys: Sequence[str] = (*OFFICIAL_KEYS, "moco_fast")) -> dict[str, Any]:
    """Load a checkpoint, by default one of this library.

    Args:
        path: the file, or the run folder that holds it.
        keys: what it must hold.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, foreign, or without one of the keys.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    expected = f"expected a file of torch.save with the keys {', '.join(keys)}"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be loaded with weights_only=True, which runs no code from the file; {expected}. "
            f"Reason: {_first_line(error)}"
        ) from error
    except Exception as error:  # on foreign bytes the unpickler raises whatever it stumbles over
        raise CheckpointError(
            f"{path} is truncated or no checkpoint; {expected}. Reason: {_first_line(error)}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; {expected}")
    if missing := [key for key in keys if key not in loaded]:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}; {expected}, it has {', '.join(map(str, loaded))[:200]}"
        )
    return loaded


def run_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    arch: str,
    step: int,
    steps_per_epoch: int,
    views: torch.Generator,
    random: list[dict[str, Any]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What a run of training writes down at a step.

    Args:
        model: whose state is taken, with DDP's prefix.
        optimizer: of the model.
        arch: of the backbone.
        step: done so far. "epoch" counts finished epochs, as in official files.
        steps_per_epoch: of the run.
        views: what views are drawn with.
        random: :func:`random_state` of every process.
        facts: what else ``moco_fast`` shall hold.
    """
    own = {"version": __version__, "step": step, "views": views.get_state(), "random": random}
    return {
        "epoch": step // steps_per_epoch,
        "arch": arch,
        "state_dict": model_state(model),
        "optimizer": optimizer.state_dict(),
        "moco_fast": own | facts,
    }


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with DDP's prefix."""
    return {PREFIX + name: value for name, value in model.state_dict().items()}


def load_model(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load the weights and the queue, strictly.

    Raises:
        CheckpointError: names or shapes differ; lists them, before anything is changed.
    """
    state = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
    if problems := mismatches(state, model.state_dict()):
        raise CheckpointError(f"the checkpoint is of another model: {problems}")
    model.load_state_dict(state)


def mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being loaded in place of ``wanted``: the first names and shapes that differ.

    Empty if nothing does.
    """
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def check_finite(model: nn.Module) -> None:
    """Raise ValueError if a weight, buffer or queued key is not finite."""
    checks.finite(**{name: value for name, value in model.state_dict().items() if value.is_floating_point()})


def random_state() -> dict[str, Any]:
    """State of every global random generator, in types that ``weights_only`` loads."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - a backbone may use it
    kind, words, position, has_gauss, gauss = numpy_state
    version, state, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(state), gauss_next],
        "numpy": [
            kind,
            torch.from_numpy(words.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, numbers, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
