"""Checkpoints: written whole or not at all, read with ``weights_only=True``.

The layout is the official one, ``{epoch, arch, state_dict, optimizer}`` with
DDP's ``module.`` prefix, so scripts made for those files read these. What they
do not know of stands under ``moco_fast``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco_fast import __version__, checks
from moco_fast.files import whole

FILE_NAME = "checkpoint.pth"
PREFIX = "module."
OFFICIAL_KEYS = ("epoch", "arch", "state_dict", "optimizer")
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into names
SHOWN = 5  # names in a message, of perhaps hundreds


class CheckpointError(ValueError):
    """A file that is not a checkpoint this version can use; the message says what was expected."""


def write_atomic(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write beside the file, flush to the disk, then rename over it.

    Whenever the process dies, ``path`` holds the previous checkpoint or this one, whole.
    """
    try:
        # One name for all: a process that is killed leaves gigabytes, which the next checkpoint replaces.
        aside = path.with_name(path.name + ".tmp")
        with whole(path, sync=True, aside=aside), open(aside, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the one before is kept" if path.exists() else ""
        raise OSError(f"{path} could not be written ({_first_line(reason)}){kept}") from error


def read(
    path: str | os.PathLike[str],
    keys: Sequence[str] = (*OFFICIAL_KEYS, "moco_fast"),
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint, by default one of this library.

    Args:
        path: the file, or the run folder that holds it.
        keys: what it must hold.
        trust: also load a file that needs more than tensors and plain types, which runs code that the file
            names. Only for files of people you trust.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, foreign, without one of the keys, or in need of ``trust``.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if keys and path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a safetensors file, of weights alone: give the checkpoint that it was made from"
        )
    expected = "expected a file of torch.save" + (f" with the keys {', '.join(keys)}" if keys else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's age; what matters is raised
            _check_sums(path)
            loaded = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # on foreign bytes the unpickler raises whatever it stumbles over
        reason = _first_line(error)
        if not trust and (needed := _GLOBAL.search(str(error))):
            advice = (
                "No checkpoint needs that: do not load it"
                if needed[2] == "whose"  # of a module that torch blocks, such as os
                else f"If you trust whoever made it, moco-fast convert {path} OUT --to official --trust "
                "loads it all the same, runs what it asks for, and writes a file that needs none"
            )
            raise CheckpointError(
                f"{path} cannot be loaded with weights_only=True, which runs no code from the file: it needs "
                f"{needed[1]}. {advice}"
            ) from error
        if isinstance(error, ImportError | AttributeError):
            raise CheckpointError(f"{path} needs what is not installed here: {reason}") from error
        if isinstance(error, pickle.UnpicklingError) and not trust:
            raise CheckpointError(
                f"{path} cannot be loaded with weights_only=True, which runs no code from the file; "
                f"{expected}. Reason: {reason}"
            ) from error
        raise CheckpointError(
            f"{path} is truncated or no checkpoint; {expected}. Reason: {reason}"
        ) from error
    if isinstance(loaded, nn.Module):  # pickled whole
        loaded = loaded.state_dict()
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; {expected}")
    missing = [key for key in keys if key not in loaded]
    if missing == ["moco_fast"]:
        raise CheckpointError(
            f"{path} was not written by this trainer. To resume an official checkpoint run the official "
            "script, also on moco_fast: python -m moco_fast.compat SCRIPT --resume FILE ..."
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}; {expected}, it has {', '.join(map(str, loaded))[:200]}"
        )
    return loaded


def digest(path: str | os.PathLike[str]) -> str:
    """What tells the checkpoint from another: a digest of the checksums of its parts."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not zipfile.is_zipfile(path):  # of an older torch
        return hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    with zipfile.ZipFile(path) as archive:
        sums = [(part.filename, part.CRC) for part in archive.infolist()]
    return hashlib.blake2b(repr(sums).encode(), digest_size=4).hexdigest()


def _check_sums(path: Path) -> None:
    """Raise ValueError for values that are not those that were written, which torch.load does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise ValueError(f"the checksum of {part} in it is wrong")


def tensors(path: str | os.PathLike[str], state: Any) -> dict[str, Tensor]:
    """A state dict under the names of the model itself, without those of what it was wrapped in.

    Raises:
        CheckpointError: not a mapping from names to tensors, or two tensors of one name.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} must hold tensors by name under state_dict")
    plain = {plain_name(name): value.detach() for name, value in state.items()}
    if len(plain) < len(state):
        twice = {name for name in state if name in plain and name != plain_name(name)} or set(state)
        raise CheckpointError(f"{path} holds tensors twice, wrapped and not: {shortened(sorted(twice))}")
    return plain


def plain_name(name: str) -> str:
    """A tensor's name without the parts that wrappers add: ``module.x._orig_mod.y`` is ``x.y``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def shortened(items: Iterable[str], between: str = ", ") -> str:
    """The first of many items, and how many more there are."""
    items = list(items)
    more = f"{between.rstrip()} and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more


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
        random: :func:`random_state` of every process, on rank 0.
        facts: what else ``moco_fast`` shall hold.
    """
    own = {
        "version": __version__,
        "step": step,
        "steps_per_epoch": steps_per_epoch,
        "views": views.get_state(),
        "random": random,
    }
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
    state = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
    if problems := mismatches(state, model.state_dict()):
        raise CheckpointError(f"the checkpoint is of another model: {problems}")
    model.load_state_dict(state)


def mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from being loaded in place of ``wanted``: the first names and shapes that differ.

    So do weights that are integers. Empty if nothing does.
    """
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    problems += [
        f"{name} is {state[name].dtype}, expected a floating-point dtype"
        for name, value in wanted.items()
        if name in state and value.is_floating_point() and not state[name].is_floating_point()
    ]
    return shortened(problems, "; ")


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


_GLOBAL = re.compile(r"GLOBAL (\S+) (was|whose)")  # how torch names the class or function


def _first_line(error: Exception) -> str:
    if "WeightsUnpickler error: " in str(error):  # of torch's advice to load it all the same, the reason
        return str(error).partition("WeightsUnpickler error: ")[2].strip().splitlines()[0][:200]
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
