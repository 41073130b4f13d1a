"""A map of features: what the model finds alike lies together.

Tests: tests/test_embedding.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_fast import checks
from moco_fast.evaluate.embedding import embed
from moco_fast.evaluate.pictures.figure import BLUE, INK, new_figure, printable, save

# Ten colours that people with any colour vision tell apart. Source: Petroff 2021, "Accessible Color
# Sequences for Data Visualization", table of ten.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581",
    "#92dadd",
)  # fmt: skip
WIDTH = 8.0  # inches
MARKERS, SIGNS = ("o", "^", "s"), "●▲■"
MOST_NAMED = len(COLOURS) * len(
    MARKERS
)  # classes beyond which colours repeat and names would cover the points


def plot_embedding(
    features: Tensor,  # (N, F)
    labels: Tensor | None,  # (N,) integers
    class_names: Sequence[str],
    out_png: str | os.PathLike[str],
    seed: int,
    heading: str = "",
) -> None:
    """Draw t-SNE of features: a point per image, in the colour of its class, whose name is at its median, or
    a little above where names would overlap.

    Args:
        features: of every image.
        labels: classes of the images; None draws all points alike.
        class_names: names by label.
        out_png: picture to write.
        seed: of the t-SNE.
        heading: what was embedded, by what; the number of points is added.

    Raises:
        ValueError: labels that do not match the features or the names, or as in
            :func:`moco_fast.evaluate.embedding.embed`.
    """
    if labels is not None:
        labels = labels.cpu()
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels must be ({len(features)},), one per row, got {tuple(labels.shape)}")
        checks.in_range("labels", labels, len(class_names), wait=True)
    places = embed(features, seed)
    width, height = (places.amax(0) - places.amin(0)).tolist()
    if height > width:  # a plane has no upright: the longer side lies, as pages are read
        places, width, height = places.flip(1), height, width
    figure = new_figure(WIDTH, 0.6 + WIDTH * max(0.5, height / width), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
    size = min(30.0, max(6.0, 16000 / len(places)))
    if labels is None:
        _points(axes, places, BLUE, "o", size)
    else:
        present = labels.unique().tolist()
        for label in present:
            colour, marker = _style(label)
            _points(axes, places[labels == label], colour, marker, size)
        if len(present) <= MOST_NAMED:
            middles = torch.stack([places[labels == label].median(0).values for label in present])
            _names(axes, middles, places, [printable(class_names[label]) for label in present], present)
    heading, text = printable(heading), f"t-SNE of {len(places):,} images"
    if labels is not None and len(present) > MOST_NAMED:
        text += f" of {len(present)} classes, too many to name"
    figure.suptitle(f"{heading}\n{text}" if heading else text, fontsize=10, color=INK, weight="bold")
    save(figure, Path(out_png))


def _style(label: int) -> tuple[str, str]:
    return COLOURS[label % len(COLOURS)], MARKERS[label // len(COLOURS) % len(MARKERS)]


def _points(axes: Any, places: Tensor, colour: str, marker: str, size: float) -> None:
    axes.scatter(*places.T.numpy(), s=size, c=colour, marker=marker, linewidths=0, alpha=0.75)


def _names(axes: Any, middles: Tensor, places: Tensor, names: Sequence[str], labels: Sequence[int]) -> None:
    """Class names in frames of their colours; where colours repeat, after the sign of their points."""
    if len(names) > len(COLOURS):
        signs = [SIGNS[MARKERS.index(_style(label)[1])] for label in labels]
        names = [f"{sign} {name}" for sign, name in zip(signs, names, strict=True)]
    for (x, y), name, label in zip(_apart(middles, places, names).tolist(), names, labels, strict=True):
        frame = {"boxstyle": "round,pad=0.25", "facecolor": (1, 1, 1, 0.85), "edgecolor": _style(label)[0]}
        axes.text(
            x, y, name, ha="center", va="center", fontsize=9, color=INK, weight="bold", bbox=frame, zorder=3
        )


def _apart(
    middles: Tensor,  # (C, 2)
    places: Tensor,  # (N, 2)
    names: Sequence[str],
) -> Tensor:
    """``middles``, moved up until no two frames overlap."""
    unit = float(places[:, 0].max() - places[:, 0].min()) / WIDTH  # per inch
    middles = middles.clone()
    order = middles[:, 1].argsort().tolist()
    for at, this in enumerate(order):
        for other in sorted(order[:at], key=lambda i: float(middles[i, 1])):  # which have their places
            reach = (0.085 * (len(names[this]) + len(names[other])) / 2 + 0.2) * unit
            gap = 0.27 * unit - float(middles[this, 1] - middles[other, 1])
            if abs(float(middles[this, 0] - middles[other, 0])) < reach and 0 < gap < 0.54 * unit:
                middles[this, 1] += gap
    return middles
