"""A run folder: whose it is, and what resuming it takes. Shared by pretraining and fine-tuning.

``config.json`` tells under "begun" what the run was asked for and which launch of torchrun asked. torchrun
starts again whatever failed, also what had refused a folder of somebody else: by these two a process that was
started again knows its own run.

Tests: tests/test_run.py, tests/test_train_processes.py, tests/test_finetune.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from moco_fast.distributed import check_agreement, rank, to_rank_0
from moco_fast.files import write_text
from moco_fast.norm import average_statistics_
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.checkpoint import CheckpointError
from moco_fast.train.config import PretrainConfig
from moco_fast.train.finetune_config import FinetuneConfig
from moco_fast.train.meter import NonFiniteLossError, check_weights
from moco_fast.train.processes import launch, may_restart, on_rank_0, restarted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.json"
Resume = bool | Literal["auto", "restart"]
C = TypeVar("C", PretrainConfig, FinetuneConfig)

# Options that a run keeps: the optimizer's state is of no use to another one, nor weights that have seen
# other labels.
KEPT = ("method", "optimizer", "from_scratch", "labels_fraction")
# Those that decide which weights a model has,
SHAPING = ("arch", "width", "dim", "queue_size", "mlp_dim", "pred_dim", "prototypes")
# how many steps an epoch has,
COUNTED = ("batch_size", "data")
# and those of an optimizer that may change: they stand in its state, but the config's are taken.
TUNED = ("weight_decay", "momentum", "lr_scale")


class FolderLock:
    """While entered, what :meth:`take` took is this process's alone; the system frees it when it dies.

    Where the file system knows no locks there is none.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        _locks.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _locks.discard(self)
        self.close()

    def close(self) -> None:
        """Give it back; in a forked process, which shares the lock, leave it to the parent alone."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def take(self, folder: Path) -> None:
        """Lock a folder, made if it is not there; FileExistsError if another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"out {str(folder)!r} is being written by another process: wait for it, or choose another"
            ) from error
        except OSError:
            pass  # network file systems without locks


_locks: set[FolderLock] = set()


def _leave_locks_to_parent() -> None:
    for lock in _locks:
        lock.close()


# Workers that outlive a killed run for some seconds must not keep what starts it again from its folder.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_parent)


@dataclass(frozen=True)
class Run(Generic[C]):
    """A run folder that a call of the trainer may write to.

    Attributes:
        folder: the path.
        config: what to train with.
        saved: the checkpoint to resume from, or None.
        asked: what the run was begun with, changed by what resuming it has overridden.
    """

    folder: Path
    config: C
    saved: dict[str, Any] | None
    asked: dict[str, Any]

    def describe(self, config: C, lock: FolderLock, **more: str) -> None:
        """Write ``config.json``: what the run made of its arguments, and whose the folder is from now on.

        Raises:
            FileExistsError: another process is writing there.
        """
        begun = {"launch": launch(), "asked": self.asked}
        text = json.dumps(config.to_dict() | more | {"begun": begun}, indent=2) + "\n"

        def write() -> None:
            lock.take(self.folder)
            write_text(self.folder / CONFIG_FILE, text)

        on_rank_0(write)

    def check_epochs(self, config: C, steps_per_epoch: int) -> None:
        """Raise CheckpointError if the steps of an epoch are others: the step tells where a run is."""
        before = self.saved["moco_fast"].get("steps_per_epoch") if self.saved else None
        if before is None:
            return
        assert self.saved is not None
        trained, done = config_of(self.saved, type(config), self.folder), self.saved["moco_fast"]["step"]
        changed = differences(config.to_dict(), trained, COUNTED)
        if before != steps_per_epoch:
            raise CheckpointError(
                f"{changed or 'other images'}: an epoch would have {steps_per_epoch} steps, and the run in "
                f"{self.folder} has done {done} of epochs of {before}. It continues "
                "with epochs as they were: leave this option out or start a new run"
            )
        if trained["batch_size"] != config.batch_size:
            raise CheckpointError(f"{changed}: the run in {self.folder} keeps its batches; start a new run")
        if done > config.epochs * steps_per_epoch:
            raise CheckpointError(
                f"epochs must be at least {done / steps_per_epoch:g}, which the run in {self.folder} has "
                f"done, got {config.epochs}"
            )

    def tell_changes(
        self, config: C, data: Mapping[str, Sequence[Any]], say: Callable[[str], object]
    ) -> None:
        """Say what is not as in the checkpoint: options, and the facts of the data."""
        if self.saved is None:
            return
        options = differences(config.to_dict(), config_of(self.saved, type(config), self.folder))
        if options:
            say(f"Resumed with other options: {options}")
        own = self.saved["moco_fast"]
        then = {name: _coarse(own[name]) for name in data if name in own}
        if images := differences({name: _coarse(values) for name, values in data.items()}, then):
            say(f"The images are not those that the run has trained on: {images}")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, views: torch.Generator) -> int:
        """Load the weights, the optimizer and all random states of the checkpoint; returns its step.

        Views that an earlier version drew on a GPU continue with other numbers.

        Raises:
            CheckpointError: weights that do not fit; says which options differ, before anything is changed.
        """
        assert self.saved is not None
        own = self.saved["moco_fast"]
        try:
            checkpoints.load_model(model, self.saved)
        except CheckpointError as error:
            trained = config_of(self.saved, type(self.config), self.folder)
            if not (changed := differences(self.config.to_dict(), trained, SHAPING)):
                raise
            raise CheckpointError(
                f"{changed}: a run continues with the model that it has trained; leave this option out or "
                f"start a new run ({error})"
            ) from error
        tuned = [{name: group[name] for name in TUNED if name in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(self.saved["optimizer"])
        for group, values in zip(optimizer.param_groups, tuned, strict=True):
            group.update(values)  # the config may have been overridden, and is what gets recorded
        if own["views"].shape == views.get_state().shape:
            views.set_state(own["views"])
        else:  # that of a GPU's generator
            views.manual_seed(views.initial_seed() + own["step"])
        if rank() < len(own["random"]):  # further processes go on with the numbers that they began with
            checkpoints.set_random_state(own["random"][rank()])
        return own["step"]

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        views: torch.Generator,
        *,
        arch: str,
        step: int,
        steps_per_epoch: int,
        facts: dict[str, Any],
    ) -> None:
        """Write the checkpoint of a step, on rank 0; all call this. ``facts``: what ``moco_fast`` gets too.

        Raises:
            NonFiniteLossError: a weight is not finite.
            Disagreement: that, in what differs between ranks; names them.
        """
        average_statistics_(model)
        problem = None
        try:
            check_weights(model, step, self.folder)
        except NonFiniteLossError as error:
            problem = error
        check_agreement({}, problem)
        random = to_rank_0(checkpoints.random_state())
        state = checkpoints.run_state(
            model, optimizer, arch=arch, step=step, steps_per_epoch=steps_per_epoch, views=views,
            random=random, facts=facts,
        )  # fmt: skip
        on_rank_0(lambda: checkpoints.write_atomic(self.folder / checkpoints.FILE_NAME, state))


def resume_or_begin(resume: Path | None, out: Path | None) -> Resume:
    """What the options ``--resume`` and ``--out`` of a command come to, as torchrun started it.

    Raises:
        ValueError: both, or neither where torchrun may restart the run.
    """
    if resume and out:
        raise ValueError(f"out must be left out with --resume, which continues in its own folder; got {out}")
    if may_restart() and not (resume or out):
        raise ValueError(
            "out must be given where torchrun may restart a run, so that it finds its checkpoint"
        )
    return True if resume else "restart" if restarted() else False


def open_run(config: C, out: Path, resume: Resume, **arguments: str | None) -> Run[C]:
    """Settle whether a run begins or is resumed, and with which config. Writes nothing.

    Args:
        config: as asked for. A run that is resumed by "auto" or "restart" takes the config of its checkpoint,
            which is what it made of the one asked for.
        out: run folder.
        resume: False: begin, in a folder that is empty or not there. True: resume. "auto": resume if there is
            a checkpoint of a run that was asked for the same, begin if there is none. "restart": resume
            what this launch of torchrun has begun in ``out``, or begin it anew if it left no checkpoint; else
            as False.
        arguments: what else the run was asked for.

    Raises:
        FileExistsError: the folder is another run's.
        CheckpointError: a checkpoint that cannot be resumed, or not with this config.
        Disagreement: the processes were given different arguments.
    """
    if not (isinstance(resume, bool) or resume in ("auto", "restart")):
        raise ValueError(f"resume must be True, False, 'auto' or 'restart', got {resume!r}")
    check_agreement({"the config": config.to_dict(), "out": str(out), "resume": resume, **arguments})
    asked = config.to_dict() | arguments
    begun = on_rank_0(lambda: _begun(out))
    if not on_rank_0(lambda: _resumes(out, resume, begun, asked)):
        return Run(out, config, None, asked)
    saved = checkpoints.read(out)
    step = saved["moco_fast"].get("step")
    check_agreement({f"the checkpoint in {out}": f"that of step {step}, {checkpoints.digest(out)}"})
    trained = config_of(saved, type(config), out)
    before = begun["asked"] if begun else trained
    if resume is not True:
        return Run(out, type(config).from_dict(trained), saved, before)
    now: dict[str, Any] = config.to_dict()
    part = now.get("labels_fraction", 1) < 1  # of the images, which the seed chooses
    for name in (*KEPT, "seed") if part else KEPT:
        if name in now:
            check_kept(name, trained.get(name, getattr(type(config), name)), now[name], out)
    overrides = {name: value for name, value in now.items() if differences(now, trained, [name])}
    return Run(out, config, saved, before | overrides)


def config_of(
    saved: Mapping[str, Any], kind: type[PretrainConfig | FinetuneConfig], where: object
) -> dict[str, Any]:
    """The values of a checkpoint's config, if its run has this kind of config.

    Raises:
        CheckpointError: pretrained where a fine-tuning run is wanted, or the other way round.
    """
    own = saved["moco_fast"]
    if kind is FinetuneConfig:
        if "finetune" not in own:
            raise CheckpointError(
                f"{where} is not a fine-tuning run: to start one from it leave --resume out"
            )
        return own["finetune"]
    if "finetune" in own:
        raise CheckpointError(
            f"{where} is a fine-tuning run: resume it with moco-fast finetune --resume {where}"
        )
    if "config" not in own:
        raise CheckpointError(f"the checkpoint in {where} lacks its config")
    return own["config"]


def check_kept(name: str, trained: object, now: object, where: object) -> None:
    """Raise CheckpointError if a run is to be resumed with another value of what it keeps."""
    if trained != now:
        raise CheckpointError(f"{name} must be that of the checkpoint in {where}, {trained!r}, got {now!r}")


def refuse_to_overwrite(out: Path) -> None:
    """Raise FileExistsError unless a run folder is empty or not there."""
    if out.exists() and any(out.iterdir()):
        resume = f"resume it (--resume {out}), or " if (out / checkpoints.FILE_NAME).exists() else ""
        raise FileExistsError(f"out {str(out)!r} is not empty: {resume}choose another --out")


def differences(now: Mapping[str, Any], then: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    """Options, by default all, that have other values now; not those that only one of the two versions has.

    Values are compared as JSON keeps them, which knows no tuples.
    """
    now, then = (json.loads(json.dumps(values)) for values in (now, then))
    asked = now if names is None else {name: now[name] for name in names if name in now}
    return "; ".join(_changes(asked, then))


def _changes(now: Mapping[str, Any], then: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name, value in now.items():
        before = then.get(name, value)
        if isinstance(value, dict) and isinstance(before, dict):  # such as the options of the views
            yield from _changes(value, before, f"{within}{name}.")
        elif value != before:
            yield f"{within}{name}={value!r}, was {before!r}"


def _coarse(values: Sequence[Any]) -> list[Any]:
    """Without the digits that depend on the number of threads."""
    return [round(value, 4) if isinstance(value, float) else value for value in values]


def _begun(out: Path) -> dict[str, Any] | None:
    """What ``config.json`` tells of whose a folder is; None if there is none, or an older version's."""
    try:
        begun = json.loads((out / CONFIG_FILE).read_text())["begun"]
        return {"launch": begun["launch"], "asked": dict(begun["asked"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resumes(out: Path, resume: Resume, begun: dict[str, Any] | None, asked: dict[str, Any]) -> bool:
    """Whether there is a checkpoint to resume from; raises FileExistsError if the folder is another run's."""
    if resume is True:
        return True
    changed = differences(asked, begun["asked"]) if begun else ""
    if not resume or (resume == "restart" and (begun is None or begun["launch"] != launch() or changed)):
        refuse_to_overwrite(out)
        return False
    if not (out / checkpoints.FILE_NAME).exists():
        return False
    if changed:
        raise FileExistsError(
            f"out {str(out)!r} holds a run that was asked for something else ({changed}): resume it "
            f"(--resume {out}), or choose another --out"
        )
    return True
