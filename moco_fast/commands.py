"""The commands behind ``moco-fast``: pretrain, knn, doctor."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Union

import torch
import tyro
from rich.console import Console
from rich.table import Table

from moco_fast import checks, doctor
from moco_fast.data.datasets import load_dataset
from moco_fast.distributed import Disagreement, from_rank_0, rank
from moco_fast.evaluate.probe import KnnProbe
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.build import build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import NonFiniteLossError, pretrain
from moco_fast.train.presets import PRESETS, preset_for
from moco_fast.train.processes import PeerFailedError, joined, may_restart, restarted

RUN_ERRORS = (NonFiniteLossError, Disagreement, PeerFailedError)

DESCRIPTION = """MoCo self-supervised pretraining.

examples:
  moco-fast pretrain                              MoCo v2 on Fashion-MNIST, minutes on two cores
  moco-fast pretrain --preset fashion-mnist-long  the same for longer
  moco-fast pretrain --data photos/ --epochs 50   a directory of images; sub-folders are classes
  moco-fast pretrain --resume runs/NAME           go on where a run stopped
  torchrun --nproc-per-node 8 -m moco_fast.cli pretrain --preset moco-v2 --data imagenet/
                                                  the same on eight GPUs; docs/distributed.md
  moco-fast knn runs/NAME                         kNN accuracy of a checkpoint
  moco-fast doctor                                what is installed, built and found
"""


@dataclass
class Pretrain:
    """Pretrain MoCo on images, and measure what was learned."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    preset: (
        Literal["fashion-mnist", "fashion-mnist-long", "digits", "folder", "moco-v1", "moco-v2"] | None
    ) = None
    """Recipe to start from, which the other options override; default: the one that suits --data."""
    out: Path | None = None
    """Run folder; default: runs/NAME-TIME."""
    resume: Path | None = None
    """Run folder to go on with; the other options override its own config."""

    def run(self) -> int:
        """Returns the exit status."""
        if self.resume and self.preset:
            raise ValueError(
                f"preset must be left out with --resume, which has its own config; got {self.preset}"
            )
        if self.resume and self.out:
            raise ValueError(
                f"out must be left out with --resume, which goes on in its own folder; got {self.out}"
            )
        config = self.config
        folder = Path(config.data).expanduser()
        if preset_for(config.data) == "folder" and folder.is_dir():
            # Absolute, for a resumed run may start in another directory.
            config = replace(config, data=str(folder.resolve()))
        if may_restart() and not (self.resume or self.out):
            raise ValueError(
                "out must be given where torchrun may restart a run, so that it finds its checkpoint"
            )
        resume: bool | Literal["auto"] = "auto" if restarted() else self.resume is not None
        console = Console()
        with joined(config.device):
            name = from_rank_0(f"{Path(config.data).name}-{time.strftime('%Y%m%d-%H%M%S')}")
            out = self.resume or self.out or Path("runs") / name
            if self.resume and self.resume.is_file():
                out = self.resume.parent
            outcome, speaks = pretrain(config, out, resume=resume, console=console), rank() == 0
        if outcome.interrupted:
            return 128 + outcome.interrupted  # as a shell reports a process that a signal ended
        if not speaks:
            return 0
        if outcome.accuracy:
            console.print(_accuracy_table(outcome.accuracy, config.knn_k))
        console.print(f"Checkpoint and pictures (curves.png, neighbours.png) are in {outcome.folder}")
        return 0


@dataclass
class Knn:
    """kNN accuracy of a checkpoint's query encoder, beside raw pixels and its random initialisation."""

    checkpoint: tyro.conf.Positional[Path]
    """Run folder, or the checkpoint.pth in it."""
    data: str | None = None
    """Dataset to measure on; default: the one it was trained on."""
    k: int = 20
    """Neighbours that vote."""
    bank: int = 60_000
    """Training images that vote, at most."""

    def run(self) -> int:
        """Returns the exit status."""
        checks.count("k", self.k)
        checks.count("bank", self.bank)
        saved = checkpoints.read(self.checkpoint)
        extras = saved["moco_fast"]
        config = PretrainConfig.from_dict(extras["config"])
        model = build_model(config, extras["channels"])
        size = config.augment.image_size
        console = Console()
        dataset = load_dataset(
            self.data or config.data, canvas=round(size * config.canvas), log=console.print
        )
        if dataset.channels > extras["channels"]:
            raise ValueError(
                f"data {dataset.name!r} has {dataset.channels} channels, "
                f"the checkpoint's encoder takes {extras['channels']}"
            )
        probe = KnnProbe(
            dataset, image_size=size, mean=extras["mean"], std=extras["std"], device=torch.device("cpu"),
            k=self.k, bank=self.bank, workers=config.workers,
        )  # fmt: skip
        if reason := probe.measurable():
            raise ValueError(f"data {dataset.name!r} cannot be measured: {reason}")
        accuracy = {"raw pixels": probe.accuracy(None), "random init": probe.accuracy(model)}
        checkpoints.load_model(model, saved)
        accuracy["trained"] = probe.accuracy(model)
        console.print(
            f"{dataset.name}: {len(probe.bank):,} images vote, {len(dataset.test or ()):,} are asked"
        )
        console.print(_accuracy_table(accuracy, self.k))
        return 0


@dataclass
class Doctor:
    """Show what is installed, what was built and why, and which backend serves which op."""

    def run(self) -> int:
        """Returns the exit status."""
        table = Table("what", "state", title="moco-fast doctor")
        for what, state in doctor.report():
            table.add_row(what, state)
        Console().print(table)
        return 0


def run(argv: Sequence[str]) -> int:
    """Parse the arguments and run the command; returns the exit status."""
    try:
        command = tyro.cli(
            Union[  # noqa: UP007 - with | the annotations would be lost
                Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=Pretrain(_defaults(argv)))],
                Annotated[Knn, tyro.conf.subcommand("knn")],
                Annotated[Doctor, tyro.conf.subcommand("doctor")],
            ],  # type: ignore[arg-type]
            prog="moco-fast",
            description=DESCRIPTION,
            args=argv,
            config=(tyro.conf.FlagConversionOff,),
        )
        return command.run()
    except (ValueError, TypeError, OSError, ImportError, *RUN_ERRORS) as error:
        # Faults of input or environment: the message says it all, a traceback would bury it.
        print(f"moco-fast: {error}", file=sys.stderr)
        return 1


def _defaults(argv: Sequence[str]) -> PretrainConfig:
    """The config that other options override: that of --resume, of --preset, or of what suits --data."""
    if argv[:1] != ["pretrain"]:
        return PretrainConfig()
    if resume := _value_of("--resume", argv):
        return PretrainConfig.from_dict(checkpoints.read(resume)["moco_fast"]["config"])
    preset = _value_of("--preset", argv) or preset_for(_value_of("--data", argv) or "fashion-mnist")
    return PRESETS.get(preset, PretrainConfig())  # the parser refuses a wrong name, and lists the right ones


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """Value of an option given as ``--option value`` or ``--option=value``."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == option:
            return following
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None


def _accuracy_table(accuracy: dict[str, float], k: int) -> Table:
    table = Table("features", "kNN accuracy", "over random init", title=f"{k} nearest neighbours, weighted")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.2%}", f"{100 * (value - accuracy['random init']):+.2f}")
    return table
