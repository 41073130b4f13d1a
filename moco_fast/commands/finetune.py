"""The command ``moco-fast finetune``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from moco_fast.commands.arguments import value_of
from moco_fast.data.datasets import absolute
from moco_fast.distributed import from_rank_0, rank
from moco_fast.extras import new_console
from moco_fast.train import checkpoint as checkpoints
from moco_fast.train.finetune import FinetuneOutcome, finetune
from moco_fast.train.finetune_config import FinetuneConfig
from moco_fast.train.processes import joined
from moco_fast.train.run import config_of, resume_or_begin


@dataclass
class Finetune:
    """Train all weights of a pretrained backbone on labelled images, and measure it on the test images.

    examples:
      moco-fast finetune runs/NAME                               all labels of the data it was trained on
      moco-fast finetune runs/NAME --labels-fraction 0.01        one label in a hundred
      moco-fast finetune runs/NAME --from-scratch                the same without the pretraining
      moco-fast finetune vit-s-300ep.pth.tar --data imagenet/ --optimizer adamw --layer-decay 0.65 \\
        --crop-scale 0.08 1 --label-smoothing 0.1 --epochs 100 --warmup-epochs 5
      moco-fast finetune --resume runs/finetune-NAME             continue where a run stopped
    """

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Run folder, the checkpoint.pth in it, or an official MoCo v1, v2 or v3 file."""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    out: Path | None = None
    """Run folder; default: runs/finetune-NAME-TIME."""
    resume: Path | None = None
    """Run folder to resume, in place of a checkpoint; the other options override its own config. It
    keeps its optimizer, its images and the number of steps in an epoch: another --batch-size or
    --labels-fraction is refused, other --data too unless it has the same classes and as many batches."""

    def run(self) -> int:
        """Returns the exit status."""
        if (self.checkpoint is None) == (self.resume is None):
            raise ValueError("give either a checkpoint to start from or --resume with a fine-tuning run")
        config, console = self.config, new_console()
        if config.data is not None:
            config = replace(config, data=absolute(config.data))
        with joined(config.device):
            resume = resume_or_begin(self.resume, self.out)
            out = self.resume or self.out
            if out is None:
                assert self.checkpoint is not None
                path = self.checkpoint.resolve()
                name = path.name if path.is_dir() else path.parent.name
                out = Path("runs") / from_rank_0(f"finetune-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
            elif out.is_file():
                out = out.parent
            outcome = finetune(config, out, checkpoint=self.checkpoint, resume=resume, console=console)
            speaks = rank() == 0
        if outcome.interrupted:
            return 128 + outcome.interrupted  # as a shell reports a process that a signal ended
        if speaks:
            console.print(_table(outcome, config))
            console.print(f"Checkpoint and pictures (curves.png, confusion.png) are in {outcome.folder}")
        return 0


def defaults(argv: Sequence[str]) -> FinetuneConfig:
    """The config that other options override: that of --resume, if given."""
    if argv[:1] == ["finetune"] and (resume := value_of("--resume", argv)):
        return FinetuneConfig.from_dict(config_of(checkpoints.read(resume), FinetuneConfig, resume))
    return FinetuneConfig()


def _table(outcome: FinetuneOutcome, config: FinetuneConfig) -> Table:
    assert outcome.scores is not None
    table = Table("start", "labelled images", "accuracy", "one of 5 right", "cross-entropy")
    scores, begin = outcome.scores, "random weights" if config.from_scratch else "pretrained"
    table.add_row(
        begin, f"{outcome.images:,}", f"{scores.acc1:.2%}", f"{scores.acc5:.2%}", f"{scores.loss:.4f}"
    )
    return table
