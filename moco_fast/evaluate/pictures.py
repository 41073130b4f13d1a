"""Pictures of a run: its curves, and what its features find similar.

Drawn on figures of their own, never through pyplot, so nothing global changes
and no display is needed. Files appear whole or not at all.

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
from torch import Tensor

from moco_fast.extras import extra

INK, FAINT = "#24292f", "#d0d7de"
BLUE, ORANGE, GREEN, RED, GREY = "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8c959f"
DPI = 150

Curve = tuple[list[float], list[float]]  # steps, values


def plot_curves(
    metrics_jsonl_path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
) -> None:
    """Draw the loss, similarities, kNN accuracy, learning rate and speed of a run, as far as recorded.

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
    figure = extra("matplotlib.figure").Figure(figsize=(5.2 * columns, 3.3 * rows), layout="constrained")
    for at, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, at + 1)
        _plain(axes)
        draw(axes, records)
    _save(figure, Path(out_png))


def plot_neighbours(
    queries: Tensor,  # (M, C, H, W) uint8, C 1 or 3
    neighbours: Tensor,  # (M, k, C, H, W) uint8, nearest first
    query_labels: Tensor | None,  # (M,)
    neighbour_labels: Tensor | None,  # (M, k)
    class_names: Sequence[str],
    out_png: str | os.PathLike[str],
    similarities: Tensor | None = None,  # (M, k)
) -> None:
    """Draw every query beside its nearest neighbours: green frames for its own class, red for others.

    Args:
        queries: images that were asked for.
        neighbours: what the features find nearest to each.
        query_labels: classes of the queries; None draws no frames.
        neighbour_labels: classes of the neighbours; None draws no frames.
        class_names: names by label.
        out_png: picture to write.
        similarities: written under the neighbours where given.
    """
    if neighbours.ndim != 5 or queries.shape != neighbours[:, 0].shape or queries.shape[1] not in (1, 3):
        raise ValueError(
            "queries must be (M, C, H, W) with C = 1 or 3 and neighbours (M, k, C, H, W), "
            f"got {tuple(queries.shape)} and {tuple(neighbours.shape)}"
        )
    count, k = neighbours.shape[:2]
    labelled = query_labels is not None and neighbour_labels is not None
    # In inches: one cell per image, a gap after the query, and room for what is written below.
    cell, pad, gap, below = 0.72, 0.08, 0.22, 0.17 if similarities is not None else 0.0
    left, top = (1.15 if labelled else 0.1), 0.32
    width = left + (k + 1) * (cell + pad) + gap + 0.1
    height = top + count * (cell + pad + below) + 0.08
    figure = extra("matplotlib.figure").Figure(figsize=(width, height))

    def show(image: Tensor, x: float, y: float, colour: str | None) -> Any:
        axes = figure.add_axes((x / width, 1 - (y + cell) / height, cell / width, cell / height))
        grey = len(image) == 1
        pixels = image[0] if grey else image.permute(1, 2, 0)
        axes.imshow(pixels.cpu().numpy(), cmap="gray" if grey else None, vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=colour is not None, color=colour or FAINT, linewidth=2.2)
        return axes

    first = left + cell + pad + gap
    for x, text in ((left, "query"), (first, "nearest neighbours" if k > 1 else "nearest")):
        figure.text(x / width, 1 - 0.2 / height, text, fontsize=8.5, color=INK, weight="bold")
    if labelled and k >= 4:  # room for a key beside the heading
        for inches, key_colour, text in ((0.92, GREEN, "same class"), (0.14, RED, "other class")):
            at = (1 - inches / width, 1 - 0.2 / height)
            figure.text(*at, text, fontsize=7.5, color=key_colour, weight="bold", ha="right")
    for row in range(count):
        y = top + row * (cell + pad + below)
        show(queries[row], left, y, None)
        if query_labels is not None and labelled:
            name = class_names[int(query_labels[row])]
            at = (0.1 / width, 1 - (y + cell / 2) / height)
            figure.text(*at, name, fontsize=8.5, color=INK, va="center")
        for column in range(k):
            colour = None
            if query_labels is not None and neighbour_labels is not None:
                colour = GREEN if query_labels[row] == neighbour_labels[row, column] else RED
            axes = show(neighbours[row, column], first + column * (cell + pad), y, colour)
            if similarities is not None:
                axes.set_xlabel(
                    f"{float(similarities[row, column]):.2f}", fontsize=6.5, color=INK, labelpad=2
                )
    _save(figure, Path(out_png))


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


def _plain(axes: Any) -> None:
    """Light grid, no box."""
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_xlabel("step", fontsize=8.5, color=INK)


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", weight="bold")


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
    _title(axes, "Contrastive loss")
    _line(axes, _curve(records, "loss"), BLUE)
    _level(axes, _last(records, "chance_loss"), GREY, "chance: log(K + 1)")


def _draw_similarity(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    _title(axes, "Cosine similarity")
    _line(axes, _curve(records, "pos_sim"), BLUE, "two views of one image")
    _line(axes, _curve(records, "neg_sim"), ORANGE, "different images")
    _legend(axes)


def _draw_knn(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    _title(axes, "kNN accuracy, %")
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


def _draw_pace(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    rates, speeds = _curve(records, "lr"), _curve(records, "images_per_s")
    if speeds[0]:
        _title(axes, "Images per second" + (" and learning rate" if rates[0] else ""))
        _line(axes, speeds, BLUE)
        axes.set_ylim(0, 1.15 * max(speeds[1]))
    else:
        _title(axes, "Learning rate")
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
    (("images_per_s", "lr"), _draw_pace),
)


def _save(figure: Any, path: Path) -> None:
    """Write under a temporary name, then rename: a reader never sees half a picture."""
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
