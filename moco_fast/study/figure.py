"""Table and figure of a study."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco_fast.evaluate.pictures.figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    new_figure,
    plain,
    save,
    title,
)  # fmt: skip
from moco_fast.study.plans import Study
from moco_fast.study.results import Row, Summary, baselines, summarise
from moco_fast.train.record import METRICS_FILE

COLOURS = (BLUE, ORANGE, GREEN, RED)
MARKERS = ("o", "s", "^", "D")


def markdown(study: Study, rows: Sequence[Row]) -> str:
    """The table of a study: mean and standard deviation over seeds, accuracies in percent."""
    head = [study.axis or "setting", "kNN, %", "linear, %", "over untrained", "loss", "learned"]
    if study.axis:
        head.insert(0, "series")
    lines = ["| " + " | ".join(head) + " |", "|:--" * (2 if study.axis else 1) + "|--:" * 4 + "|:--|"]
    for name in ("raw pixels", "random init"):
        levels = [str(baselines(rows, measure)[name]) for measure in ("knn", "linear")]
        lines.append("| " + " | ".join([name, *([""] if study.axis else []), *levels, "", "", ""]) + " |")
    for line in summarise(rows):
        cells = [line.series, *([f"{line.x:g}"] if line.x is not None else [])]
        loss = "-" if math.isnan(line.loss.mean) else f"{line.loss.mean:.2f}"
        cells += [str(line.knn), str(line.linear), str(line.over_random), loss, line.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_study(study: Study, rows: Sequence[Row], folder: Path, out_png: Path) -> None:
    """Draw accuracy over the axis, or side by side with the loss curves of the runs in ``folder``."""
    lines = summarise(rows)
    if study.axis:
        figure = new_figure(7.0, 4.2, layout="constrained")
        _over_axis(figure.add_subplot(), study, lines, rows)
    else:
        curves = len(lines) <= len(COLOURS)
        figure = new_figure(10.5 if curves else 7.5, 1.6 + 0.42 * max(4, len(lines)), layout="constrained")
        axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
        _side_by_side(axes[0], lines, rows)
        if curves:
            _losses(axes[1], lines, rows, folder)
    heading = textwrap.fill(study.question, round(9 * figure.get_figwidth()))
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11.5, color=INK, weight="bold")
    save(figure, out_png)


def _over_axis(axes: Any, study: Study, lines: Sequence[Summary], rows: Sequence[Row]) -> None:
    plain(axes)
    seeds = len({row.seed for row in rows})
    title(axes, f"kNN accuracy, %; {seeds} seed{'s' if seeds > 1 else ''}")
    assert study.axis is not None
    places = sorted({line.x for line in lines if line.x is not None})
    # Sizes are spread by factors of two; momenta, which crowd below 1, as categories.
    logarithmic = min(places) > 0 and max(places) / min(places) >= 10
    at = {x: x if logarithmic else float(i) for i, x in enumerate(places)}
    for i, series in enumerate(dict.fromkeys(line.series for line in lines)):
        own = sorted((line for line in lines if line.series == series), key=lambda line: line.x or 0)
        own = [line for line in own if not math.isnan(line.knn.mean)]
        x, y = [at[line.x] for line in own if line.x is not None], [line.knn.mean for line in own]
        bars = [0.0 if math.isnan(line.knn.deviation) else line.knn.deviation for line in own]
        axes.errorbar(
            x, y, bars, color=COLOURS[i % 4], marker=MARKERS[i % 4], linewidth=1.8, markersize=5, capsize=3,
            label=series,
        )  # fmt: skip
    for name, level in baselines(rows, "knn").items():
        axes.axhline(level.mean, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"{name} {level.mean:.1f}", (1, level.mean), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color=GREY,
        )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log")
    # 127 and 128 have one place on a logarithmic axis, and one number.
    shown = [x for i, x in enumerate(places) if not logarithmic or x == places[-1] or places[i + 1] / x > 1.1]
    axes.set_xticks([at[x] for x in shown], [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.set_xlabel(study.axis, fontsize=9, color=INK)
    if len({line.series for line in lines}) > 1:
        axes.legend(fontsize=8.5, frameon=False)


def _side_by_side(axes: Any, lines: Sequence[Summary], rows: Sequence[Row]) -> None:
    plain(axes)
    axes.grid(axis="y", visible=False)
    title(axes, "accuracy, %: kNN (circles) and linear (squares)")
    height = range(len(lines), 0, -1)
    for measure, colour, marker, shift in (("knn", BLUE, "o", 0.12), ("linear", ORANGE, "s", -0.12)):
        found = [getattr(line, measure) for line in lines]
        bars = [0.0 if math.isnan(value.deviation) else value.deviation for value in found]
        axes.errorbar(
            [value.mean for value in found], [y + shift for y in height], xerr=bars, fmt=marker, color=colour,
            markersize=5.5, capsize=3,
        )  # fmt: skip
        for name, style in (("raw pixels", ":"), ("random init", "--")):
            axes.axvline(
                baselines(rows, measure)[name].mean, color=colour, linewidth=1, linestyle=style, alpha=0.6
            )
    axes.set_yticks(list(height), [line.series for line in lines])
    axes.set_ylim(0.4, len(lines) + 0.6)
    axes.set_xlabel("dashed: untrained encoder; dotted: raw pixels", fontsize=8.5, color=INK)


def _losses(axes: Any, lines: Sequence[Summary], rows: Sequence[Row], folder: Path) -> None:
    plain(axes)
    title(axes, "loss")
    for i, line in enumerate(lines):
        for row in rows:
            path = folder / row.folder / METRICS_FILE
            if row.series != line.series or not path.exists():
                continue
            records = [json.loads(text) for text in path.read_text().splitlines()]
            known = [(r["step"], r["loss"]) for r in records if "loss" in r]
            axes.plot(
                *zip(*known, strict=True), color=COLOURS[i], linewidth=1.5,
                label=line.series if row.seed == rows[0].seed else None,
            )  # fmt: skip
    axes.set_xlabel("step", fontsize=8.5, color=INK)
    axes.legend(fontsize=8.5, frameon=False)
