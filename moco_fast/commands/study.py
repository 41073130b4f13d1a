"""The command ``moco-fast study``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.markdown import Markdown

from moco_fast import checks
from moco_fast.data.datasets import absolute
from moco_fast.distributed import rank
from moco_fast.extras import new_console
from moco_fast.files import write_text
from moco_fast.study.figure import markdown, plot_study
from moco_fast.study.plans import STUDIES, Point
from moco_fast.study.sweep import run_sweep
from moco_fast.train.processes import joined, on_rank_0

if TYPE_CHECKING:
    StudyName = str
else:  # so that the command line lists them
    StudyName = Literal[tuple(STUDIES)]


@dataclass
class Study:
    """Answer a question by a sweep of runs, with a table and a figure; continues where it was stopped.

    methods compares all methods, dictionary the number of negatives (figure 3 of the MoCo paper), momentum
    that of the key encoder, temperature T, shuffle shuffled with plain batch norm, batch-size MoCo v3's.

    examples:
      moco-fast study momentum                                     minutes on two cores
      moco-fast study methods --seeds 3                            mean and deviation over seeds
      moco-fast study dictionary --scale full --data imagenet/     with MoCo v1's schedule, on GPUs
    """

    name: tyro.conf.Positional[StudyName]
    """The study to run."""
    scale: Literal["small", "full"] = "small"
    """Fashion-MNIST on a CPU, minutes; or ImageNet or CIFAR-10 by published recipes, for GPUs."""
    data: str | None = None
    """Dataset or directory of images; default: that of the scale."""
    epochs: int | None = None
    """Epochs of every run, its warm-up and milestones scaled alike; default: that of the scale."""
    seeds: int = 1
    """Seeds of every point: 0, 1, ..."""
    out: Path | None = None
    """Folder of the study; default: studies/NAME-SCALE. Gets a folder per run, results.csv, table.md and
    figure.png."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:1"."""

    def run(self) -> int:
        """Returns the exit status."""
        checks.count("seeds", self.seeds)
        study = STUDIES[self.name]
        changes: dict[str, object] = {"device": self.device}
        if self.data is not None:
            changes["data"] = absolute(self.data)  # for runs that are evaluated or resumed elsewhere
        points = study.small() if self.scale == "small" else study.full()
        points = [replace(p, config=replace(p.config, **changes)) for p in points]  # type: ignore[arg-type]
        if self.epochs is not None:
            points = [replace(p, config=p.config.with_epochs(self.epochs)) for p in points]
        out = self.out or Path("studies") / f"{self.name}-{self.scale}"
        with joined(self.device):  # until all is written, which rank 0 does
            return self._run(points, out, new_console(quiet=rank() > 0))

    def _run(self, points: list[Point], out: Path, console: Console) -> int:
        study = STUDIES[self.name]
        console.print(f"{study.question} ({study.source}.) {len(points)} settings x {self.seeds}, in {out}")
        sweep = run_sweep(points, range(self.seeds), out, console)
        if sweep.interrupted:
            console.print(f"Stopped after {len(sweep.rows)} runs. The same command continues.")
            return 128 + sweep.interrupted
        table = markdown(study, sweep.rows)

        def write() -> None:
            write_text(out / "table.md", table)
            plot_study(study, sweep.rows, out, out / "figure.png")

        on_rank_0(write)
        console.print(Markdown(table))
        console.print(f"results.csv, table.md and figure.png are in {out}")
        return 0
