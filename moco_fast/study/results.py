"""What a study found: rows in a CSV file, and their summary over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from moco_fast.files import write_text

CSV_FILE = "results.csv"


@dataclass(frozen=True)
class Row:
    """One run. Accuracies are shares of the test images, NaN where the run ended without."""

    series: str
    x: float | None
    seed: int
    knn: float
    knn_random_init: float
    knn_raw_pixels: float
    linear: float
    linear_random_init: float
    linear_raw_pixels: float
    loss: float
    """Mean over the last tenth of the run."""
    spread: float
    rank: float
    collapsed: bool
    note: str
    seconds: float
    folder: str


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; NaN deviation for one seed."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.1f}" + ("" if math.isnan(self.deviation) else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Summary:
    """All seeds of a point; accuracies in percent."""

    series: str
    x: float | None
    knn: Spread
    linear: Spread
    loss: Spread
    over_random: Spread
    """kNN accuracy less that of the same network before training, seed by seed."""
    verdict: str


def read_rows(folder: Path) -> list[Row]:
    """Rows written so far, none if there are none.

    Raises:
        ValueError: a file of another version or edited by hand.
    """
    path = folder / CSV_FILE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    names = [f.name for f in fields(Row)]
    try:
        return [_row({name: entry[name] for name in names}) for entry in found]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this version ({error}); move it away") from error


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write all rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)
    write_text(folder / CSV_FILE, text.getvalue())


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Points in the order of their first row, over seeds."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.series, row.x), []).append(row)
    return [_summary(group) for group in groups.values()]


def baselines(rows: Sequence[Row], measure: str) -> dict[str, Spread]:
    """Accuracy in percent of raw pixels and of untrained encoders, "knn" or "linear"."""
    found = {}
    for name, field in (("raw pixels", "raw_pixels"), ("random init", "random_init")):
        measured = [(row.seed, getattr(row, f"{measure}_{field}")) for row in rows]
        by_seed = {seed: value for seed, value in measured if not math.isnan(value)}
        found[name] = _spread([100 * value for value in by_seed.values()])
    return found


def _summary(rows: Sequence[Row]) -> Summary:
    over = _spread([100 * (row.knn - row.knn_random_init) for row in rows])
    knn = _spread([100 * row.knn for row in rows])
    return Summary(
        rows[0].series, rows[0].x, knn, _spread([100 * row.linear for row in rows]),
        _spread([row.loss for row in rows]), over, _verdict(rows, over),
    )  # fmt: skip


def _verdict(rows: Sequence[Row], over: Spread) -> str:
    """Whether it learned: better than the untrained network by more than the spread over seeds."""
    if notes := sorted({row.note for row in rows if row.note}):
        return f"no: {'; '.join(notes)}"
    if collapsed := sum(row.collapsed for row in rows):
        last = rows[-1]
        return f"no: {collapsed} of {len(rows)} collapsed (spread {last.spread:.2f}, rank {last.rank:.1f})"
    if math.isnan(over.mean):
        return "not measured"
    margin = 0.0 if math.isnan(over.deviation) else over.deviation
    if over.mean > margin:
        return "yes"
    return "no: not better than untrained" + (" by more than the spread" if margin else "")


def _spread(values: Sequence[float]) -> Spread:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan)


def _row(text: dict[str, str]) -> Row:
    values: dict[str, Any] = dict(text)
    for f in fields(Row):
        if f.type == "float":
            values[f.name] = float(text[f.name])
    values["x"] = float(text["x"]) if text["x"] else None
    values["seed"] = int(text["seed"])
    values["collapsed"] = {"True": True, "False": False}[text["collapsed"]]
    return Row(**values)
