"""The command ``moco-fast pretrain``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from moco_fast.commands.arguments import value_of
from moco_fast.commands.tables import knn_table
from moco_fast.data.datasets import absolute
from moco_fast.distributed import from_rank_0, rank
from moco_fast.extras import new_console
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import pretrain
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS, preset_for
from moco_fast.train.processes import joined
from moco_fast.train.run import check_kept, config_of, resume_or_begin

if TYPE_CHECKING:
    PresetName = str
else:  # so that the command line lists them
    PresetName = Literal[tuple(PRESETS)]


@dataclass
class Pretrain:
    """Pretrain MoCo, or a method that it is measured against, on images, and measure what was learned."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    preset: PresetName | None = None
    """Recipe to start from, which the other options override; default: the one that suits --data. "moco-fast
    presets" says what each reaches."""
    out: Path | None = None
    """Run folder; default: runs/NAME-TIME."""
    resume: Path | None = None
    """Run folder to resume; the other options override its own config. It keeps its method, model,
    optimizer and the number of steps in an epoch: another --batch-size is refused, other --data too unless it
    has as many batches."""

    def run(self) -> int:
        """Returns the exit status."""
        if self.resume and self.preset:
            raise ValueError(
                f"preset must be left out with --resume, which has its own config; got {self.preset}"
            )
        config = replace(self.config, data=absolute(self.config.data))
        console = new_console()
        with joined(config.device):
            resume = resume_or_begin(self.resume, self.out)
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
            console.print(knn_table(outcome.accuracy, config.knn_k))
        console.print(f"Checkpoint and pictures (curves.png, neighbours.png) are in {outcome.folder}")
        return 0


def defaults(argv: Sequence[str]) -> PretrainConfig:
    """The config that other options override, with views of their own for options --augment-second.*."""
    if argv[:1] != ["pretrain"]:
        return PretrainConfig()
    config = _asked_for(argv)
    if config.augment_second is None and any(a.startswith("--augment-second.") for a in argv):
        return replace(config, augment_second=config.augment)
    return config


def _asked_for(argv: Sequence[str]) -> PretrainConfig:
    """The config of --resume, of --preset, or of what suits --data."""
    if resume := value_of("--resume", argv):
        config = PretrainConfig.from_dict(config_of(checkpoints.read(resume), PretrainConfig, resume))
        check_kept("method", config.method, value_of("--method", argv) or config.method, resume)
        return config
    preset = value_of("--preset", argv) or preset_for(value_of("--data", argv) or "fashion-mnist")
    # The parser refuses a wrong name, and lists the right ones.
    config = PRESETS[preset].config if preset in PRESETS else PretrainConfig()
    method = value_of("--method", argv)
    return config.with_method(method) if method in METHODS else config
