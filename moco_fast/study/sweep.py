"""Running a study: every point with every seed, each in a folder of its own, going on where it stopped."""

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
from moco_fast.files import write_text
from moco_fast.study.plans import Point
from moco_fast.study.results import Row, read_rows, write_rows
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import NonFiniteLossError, pretrain
from moco_fast.train.processes import joined, on_rank_0
from moco_fast.train.record import METRICS_FILE

SETTINGS_FILE = "point.json"


@dataclass(frozen=True)
class Sweep:
    """How a sweep ended."""

    rows: list[Row]
    interrupted: int
    """Number of the signal that ended it, or 0."""


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
    runs = [(point, seed, replace(point.config, seed=seed)) for seed in seeds for point in points]
    with joined(runs[0][2].device):
        rows = on_rank_0(lambda: read_rows(out))
        done = {(row.series, row.x, row.seed) for row in rows}
        todo = [run for run in runs if (run[0].series, run[0].x, run[1]) not in done]
        for point, seed, config in runs:
            on_rank_0(lambda folder=_folder(out, point, seed), config=config: _claim(folder, config))
        began = time.monotonic()
        for number, (point, seed, config) in enumerate(todo):
            where = "" if point.x is None else f", {point.x:g}"
            spent = time.monotonic() - began
            left = f", about {spent / number * (len(todo) - number) / 60:.0f} min left" if number else ""
            if rank() == 0:
                console.rule(
                    f"run {len(runs) - len(todo) + number + 1}/{len(runs)}: {point.series}{where}, seed {seed}{left}"
                )
            folder = _folder(out, point, seed)
            row, interrupted = _run(point, seed, config, folder, console)
            if interrupted:
                return Sweep(rows, interrupted)
            assert row is not None
            rows.append(row)
            on_rank_0(lambda: write_rows(out, rows))
    order = {(point.series, point.x): i for i, point in enumerate(points)}
    chosen = [row for row in rows if (row.series, row.x) in order and row.seed in seeds]
    return Sweep(sorted(chosen, key=lambda row: (order[row.series, row.x], row.seed)), 0)


def _run(
    point: Point, seed: int, config: PretrainConfig, folder: Path, console: Any
) -> tuple[Row | None, int]:
    """One run; its row, or the signal that ended it."""
    began = time.monotonic()
    note, outcome = "", None
    try:
        outcome = pretrain(config, folder, resume="auto", console=console)
    except NonFiniteLossError as error:  # a result, not a fault of the study
        note = f"diverged ({str(error).partition('.')[0]})"
    if outcome is not None and outcome.interrupted:
        return None, int(outcome.interrupted)
    linear = on_rank_0(lambda: _linear(folder, config)) if outcome is not None else {}
    last = _last_records(folder)
    knn = outcome.accuracy if outcome is not None else {}
    row = Row(
        series=point.series, x=point.x, seed=seed,
        knn=knn.get("trained", math.nan), knn_random_init=knn.get("random init", math.nan),
        knn_raw_pixels=knn.get("raw pixels", math.nan),
        linear=linear.get("trained", math.nan), linear_random_init=linear.get("random init", math.nan),
        linear_raw_pixels=linear.get("raw pixels", math.nan),
        loss=last["loss"], spread=last["spread"], rank=last["rank"],
        collapsed=outcome is not None and outcome.collapsed, note=note,
        seconds=round(time.monotonic() - began, 1), folder=folder.name,
    )  # fmt: skip
    return row, 0


def _claim(folder: Path, config: PretrainConfig) -> None:
    """Note down the settings of a run before it begins, or compare with those noted."""
    path = folder / SETTINGS_FILE
    wanted = json.loads(json.dumps(config.to_dict()))
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    if found != wanted:
        changed = [
            f"{name} {found.get(name)!r} then, {wanted.get(name)!r} now"
            for name in wanted.keys() | found.keys()
            if found.get(name) != wanted.get(name)
        ]
        raise ValueError(
            f"{folder} was run with other settings ({'; '.join(sorted(changed))}): choose another --out"
        )


def _last_records(folder: Path) -> dict[str, float]:
    """Means over the last tenth of a run's records."""
    lines = (folder / METRICS_FILE).read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    tail = records[-max(1, len(records) // 10) :]
    return {
        name: sum(record[name] for record in tail) / len(tail) if tail else math.nan
        for name in ("loss", "spread", "rank")
    }


def _folder(out: Path, point: Point, seed: int) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", point.series.lower()).strip("-")
    return out / (words + ("" if point.x is None else f"-{point.x:g}") + f"-seed{seed}")
