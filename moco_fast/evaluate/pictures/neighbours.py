"""Queries beside what the features find nearest to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moco_fast.evaluate.pictures.figure import FAINT, GREEN, INK, RED, new_figure, printable, save

NAME_LENGTH = 15  # characters of a class name beside its query


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
        queries: the images whose neighbours they are.
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
    figure = new_figure(width, height)

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
            name = printable(class_names[int(query_labels[row])], NAME_LENGTH)
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
    save(figure, Path(out_png))
