"""Running a study: every point with every seed, each in a folder of its own, continuing where it stopped."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moco_fast.distributed import rank
from moco_fast.evaluate.linear import LinearConfig, evaluate_linear
from moco_fast.files import write_text
from moco_fast.study.plans import Point
from moco_fast.study.results import Row, read_rows, write_rows
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import pretrain
from moco_fast.train.meter import NonFiniteLossError
from moco_fast.train.processes import joined, on_rank_0
from moco_fast.train.record import METRICS_FILE
from moco_fast.train.subject import PIXELS, RANDOM, TRAINED, load_subject

SETTINGS_FILE = "point.json"
# Standardised features, so that a few learning rates and epochs suit every method.
PROBE = LinearConfig(epochs=20, lr=(0.1, 1.0, 10.0), normalize=True)


@dataclass(frozen=True)
class Sweep:
    """How a sweep ended."""

    rows: list[Row]
    interrupted: int
    """Number of the signal that ended it, or 0."""


@dataclass(frozen=True)
class _Run:
    point: Point
    seed: int
    config: PretrainConfig
    folder: Path

    @property
    def key(self) -> tuple[str, float | None, int]:
        return self.point.series, self.point.x, self.seed


def run_sweep(points: Sequence[Point], seeds: Sequence[int], out: Path, console: Any) -> Sweep:
    """Run what is not yet in ``out/results.csv``, and add it there run by run.

    Args:
        points: settings.
        seeds: of every one of them.
        out: folder of the study; each run gets one in it.
        console: a rich Console.

    Raises:
        ValueError: a run in ``out`` was made with other settings.
    """
    runs = [
        _Run(point, seed, replace(point.config, seed=seed), out / _name(point, seed))
        for seed in seeds
        for point in points
    ]
    with joined(points[0].config.device):
        on_rank_0(lambda: _claim(runs))
        rows = on_rank_0(lambda: read_rows(out))
        done = {(row.series, row.x, row.seed) for row in rows}
        todo = [run for run in runs if run.key not in done]
        began = time.monotonic()
        for number, run in enumerate(todo):
            if rank() == 0:
                left = (time.monotonic() - began) / max(1, number) * (len(todo) - number) / 60
                console.rule(
                    f"run {len(runs) - len(todo) + number + 1} of {len(runs)}: {run.folder.name}"
                    + (f", about {left:.0f} min left" if number else "")
                )
            row, interrupted = _result(run, rows, console)
            if row is None:
                return Sweep(rows, interrupted)
            rows.append(row)
            on_rank_0(lambda: write_rows(out, rows))
    order = {run.key: i for i, run in enumerate(runs)}
    chosen = [row for row in rows if (row.series, row.x, row.seed) in order]
    return Sweep(sorted(chosen, key=lambda row: order[row.series, row.x, row.seed]), 0)


def _result(run: _Run, rows: Sequence[Row], console: Any) -> tuple[Row | None, int]:
    """Do a run; its row, or None and the signal that ended it."""
    began = time.monotonic()
    knn: dict[str, float] = {}
    linear: dict[str, float] = {}
    note, collapsed = "", False
    try:
        outcome = pretrain(run.config, run.folder, resume="auto", console=console, measured=True)
        if outcome.interrupted:
            return None, int(outcome.interrupted)
        knn, collapsed = outcome.accuracy, outcome.collapsed
        linear = on_rank_0(lambda: _linear(run, rows, console))
    except NonFiniteLossError as error:  # a result, not a fault of the study
        note = f"diverged: {str(error).partition('.')[0]}"
    last = _last_records(run.folder)
    row = Row(
        series=run.point.series, x=run.point.x, seed=run.seed,
        knn=knn.get(TRAINED, math.nan), knn_random_init=knn.get(RANDOM, math.nan),
        knn_raw_pixels=knn.get(PIXELS, math.nan),
        linear=linear.get(TRAINED, math.nan), linear_random_init=linear.get(RANDOM, math.nan),
        linear_raw_pixels=linear.get(PIXELS, math.nan),
        loss=last["loss"], spread=last["spread"], rank=last["rank"], collapsed=collapsed, note=note,
        seconds=round(time.monotonic() - began, 1), folder=run.folder.name,
    )  # fmt: skip
    return row, 0


def _linear(run: _Run, rows: Sequence[Row], console: Any) -> dict[str, float]:
    """Linear accuracy of the run, and of what it is compared with unless a run of that seed has told."""
    subject = load_subject(run.folder, None, run.config.device, console.print, workers=run.config.workers)
    known = [row for row in rows if row.seed == run.seed and not math.isnan(row.linear_random_init)]
    found = {}
    if known:
        found = {RANDOM: known[0].linear_random_init, PIXELS: known[0].linear_raw_pixels}
    for name, network, view in subject.rows(len(subject.dataset.train), not known):
        found[name] = evaluate_linear(network, subject.dataset, view, PROBE).best.acc1
    return found


def _claim(runs: Sequence[_Run]) -> None:
    """Note down the settings of all runs before the first begins, or compare with those noted."""
    for run in runs:
        path = run.folder / SETTINGS_FILE
        wanted = json.loads(json.dumps(run.config.to_dict()))
        if not path.exists():
            write_text(path, json.dumps(wanted, indent=2) + "\n")
            continue
        found = json.loads(path.read_text())
        changed = [
            f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
            for name in sorted(wanted.keys() | found.keys())
            if found.get(name) != wanted.get(name)
        ]
        if changed:
            raise ValueError(f"{run.folder} has other settings, {'; '.join(changed)}: choose another --out")


def _last_records(folder: Path) -> dict[str, float]:
    """Means over the last tenth of a run's records."""
    lines = (folder / METRICS_FILE).read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    tail = records[-max(1, len(records) // 10) :]
    return {
        name: sum(record[name] for record in tail) / len(tail) if tail else math.nan
        for name in ("loss", "spread", "rank")
    }


def _name(point: Point, seed: int) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", point.series.lower()).strip("-")
    return words + ("" if point.x is None else f"-{point.x:g}") + f"-seed{seed}"
