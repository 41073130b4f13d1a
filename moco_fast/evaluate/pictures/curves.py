"""The curves of a run, from its metrics.jsonl.

Tests: tests/test_pictures.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moco_fast.evaluate.pictures.figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    new_figure,
    plain,
    save,
    title,
)

Curve = tuple[list[float], list[float]]  # steps, values


def plot_curves(
    metrics_jsonl_path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
) -> None:
    """Draw losses, similarities, accuracies, learning rate and speed of a run, as far as recorded.

    Args:
        metrics_jsonl_path: one JSON object per line; a half-written last line is left out.
        out_png: picture to write.

    Raises:
        ValueError: no line holds a step and a value that can be drawn, or a line in the middle is damaged.
    """
    records = _read_records(Path(metrics_jsonl_path))
    panels = [draw for keys, draw in _PANELS if any(_curve(records, key)[0] for key in keys)]
    if not panels:
        raise ValueError(f"{metrics_jsonl_path} holds nothing to draw: no line has a step and a known value")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5.2 * columns, 3.3 * rows, layout="constrained")
    for at, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, at + 1)
        plain(axes)
        axes.set_xlabel("step", fontsize=8.5, color=INK)
        draw(axes, records)
    save(figure, Path(out_png))


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # only the last line can be half-written: the file is appended to
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """Steps and finite values of one key."""
    points = [(r["step"], r[key]) for r in records if r.get("step") is not None and r.get(key) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _last(records: Sequence[dict[str, Any]], key: str) -> float | None:
    """Latest value of a key, whether or not its line has a step."""
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)


def _line(axes: Any, curve: Curve, colour: str, label: str | None = None, marker: bool = False) -> None:
    """A curve; a long one faint, with its running mean on top."""
    steps, values = curve
    window = len(values) // 50
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
        padded = torch.tensor(values, dtype=torch.float64)
        sums = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        steps = steps[window // 2 :][: len(values) - window + 1]  # centred: a trailing mean lags behind
        values = ((sums[window:] - sums[:-window]) / window).tolist()
    style = {"marker": "o", "markersize": 4} if marker or len(values) == 1 else {}
    axes.plot(steps, values, color=colour, linewidth=1.8, label=label, **style)


def _level(axes: Any, value: float | None, colour: str, text: str) -> None:
    """A dashed line across, named at its right end."""
    if value is None:
        return
    axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.annotate(
        text, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 4), textcoords="offset points",
        ha="right", fontsize=7.5, color=colour, bbox=box,
    )  # fmt: skip


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")


def _draw_loss(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    title(axes, "Contrastive loss")
    _line(axes, _curve(records, "loss"), BLUE)
    _level(axes, _last(records, "chance_loss"), GREY, "chance")


def _draw_similarity(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    title(axes, "Cosine similarity")
    _line(axes, _curve(records, "pos_sim"), BLUE, "two views of one image")
    _line(axes, _curve(records, "neg_sim"), ORANGE, "different images")
    _legend(axes)


def _draw_knn(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    title(axes, "kNN accuracy, %")
    steps, values = _curve(records, "knn")
    _line(axes, (steps, [100 * value for value in values]), GREEN, marker=True)
    for key, name in (("knn_raw_pixels", "raw pixels"), ("knn_random_init", "untrained encoder")):
        if (level := _last(records, key)) is not None:
            _level(axes, 100 * level, GREY, f"{name} {100 * level:.1f}")
    axes.annotate(
        f"{100 * values[-1]:.1f}", (steps[-1], 100 * values[-1]), xytext=(0, 6), textcoords="offset points",
        ha="center", fontsize=8.5, color=GREEN, weight="bold",
    )  # fmt: skip
    axes.margins(y=0.15)


def _draw_cross_entropy(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    title(axes, "Cross-entropy")
    _line(axes, _curve(records, "train_loss"), BLUE, "training images, augmented")
    _line(axes, _curve(records, "test_loss"), ORANGE, "test images", marker=True)
    _legend(axes)


def _draw_accuracy(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    title(axes, "Test accuracy, %")
    for key, colour, name in (("test_acc5", GREY, "one of 5 right"), ("test_acc1", GREEN, "right")):
        steps, values = _curve(records, key)
        if values:
            curve = steps, [100 * value for value in values]
            _line(axes, curve, colour, f"{name}: {curve[1][-1]:.2f}", marker=True)
    _legend(axes)


def _draw_pace(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    rates, speeds = _curve(records, "lr"), _curve(records, "images_per_s")
    if speeds[0]:
        title(axes, "Images per second" + (" and learning rate" if rates[0] else ""))
        _line(axes, speeds, BLUE)
        axes.set_ylim(0, 1.15 * max(speeds[1]))
    else:
        title(axes, "Learning rate")
    if rates[0]:
        if speeds[0]:
            axes.tick_params(axis="y", colors=BLUE)
            axes = axes.twinx()
            axes.spines[:].set_visible(False)
            axes.tick_params(colors=ORANGE, labelsize=8, length=0)
        axes.plot(*rates, color=ORANGE, linewidth=1.8)
        axes.set_ylim(0, 1.15 * max(rates[1]) or 1)


_PANELS = (
    (("loss",), _draw_loss),
    (("pos_sim", "neg_sim"), _draw_similarity),
    (("knn",), _draw_knn),
    (("train_loss", "test_loss"), _draw_cross_entropy),
    (("test_acc1", "test_acc5"), _draw_accuracy),
    (("images_per_s", "lr"), _draw_pace),
)
