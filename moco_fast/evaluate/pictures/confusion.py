"""Which classes are taken for which.

Tests: tests/test_confusion.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moco_fast.evaluate.pictures.figure import BLUE, FAINT, INK, new_figure, printable, save, title
from moco_fast.extras import extra

MOST_WITH_NUMBERS = 20  # classes up to which a cell has room for a number
LISTED = 15  # confusions named beside a larger matrix
NAME_LENGTH = 18  # characters of a class name


class Mistake(NamedTuple):
    """One class taken for another."""

    true: int
    predicted: int
    share: float  # of the images of the true class


def plot_confusion(
    counts: Tensor,  # (C, C), rows are the true classes, columns the predicted ones
    class_names: Sequence[str],
    out_png: str | os.PathLike[str],
    heading: str,
) -> None:
    """Draw a confusion matrix in percent of every true class.

    Up to 20 classes every cell has its number; beyond, the largest confusions are listed beside it.

    Args:
        counts: images by true and predicted class, as of :func:`moco_fast.evaluate.scores.confusion`.
        class_names: names by label.
        out_png: picture to write.
        heading: what was classified, by what.

    Raises:
        ValueError: ``counts`` is not a square of numbers >= 0, holds no image, or the names are not C.
    """
    classes = len(counts)
    if counts.ndim != 2 or counts.shape[1] != classes or classes == 0 or bool((counts < 0).any()):
        raise ValueError(f"counts must be (C, C) and not negative, got shape {tuple(counts.shape)}")
    if int(counts.sum()) == 0:
        raise ValueError("counts must hold at least one image")
    if len(class_names) != classes:
        raise ValueError(f"class_names must hold {classes} names, one per row, got {len(class_names)}")
    names = [printable(name, NAME_LENGTH) for name in class_names]
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    right = counts.diagonal().sum().item() / counts.sum().item()
    text = f"{printable(heading)}\n{right:.2%} right"

    if classes <= MOST_WITH_NUMBERS:
        side = max(2.2, 0.46 * classes)
        figure = new_figure(side + 2.4, side + 1.5, layout="constrained")
        axes = figure.add_subplot()
        _matrix(axes, share)
        tilt = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
        axes.set_xticks(range(classes), names, **tilt)
        axes.set_yticks(range(classes), names)
        for row in range(classes):
            for column in range(classes):
                _number(axes, row, column, float(share[row, column]))
    else:
        figure = new_figure(9.6, 5.6, layout="constrained")
        axes, beside = figure.subplots(1, 2, width_ratios=(5, 3.6))
        _matrix(axes, share)
        axes.set(xticks=[], yticks=[])
        beside.set_axis_off()
        _list(beside, largest_confusions(counts, LISTED), names)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    figure.suptitle(text, fontsize=10, color=INK, weight="bold")
    save(figure, Path(out_png))


def largest_confusions(
    counts: Tensor,  # (C, C), rows are the true classes
    most: int,
) -> list[Mistake]:
    """The ``most`` pairs of classes most often confused, in shares of the true class, largest first."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    order = share.flatten().argsort(descending=True, stable=True)[:most].tolist()
    pairs = [divmod(at, len(counts)) for at in order]
    return [Mistake(a, b, share[a, b].item()) for a, b in pairs if share[a, b] > 0]


def _matrix(axes: Any, share: Tensor) -> None:
    colours = extra("matplotlib.colors").LinearSegmentedColormap.from_list("", ["white", BLUE])
    # By the square root: a class mistaken in one case of twenty must not look like none.
    norm = extra("matplotlib.colors").PowerNorm(0.5, 0, 1)
    axes.imshow(share.cpu().numpy(), cmap=colours, norm=norm, interpolation="nearest")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.spines[:].set_color(FAINT)


def _number(axes: Any, row: int, column: int, share: float) -> None:
    """Percent in a cell; nothing for what rounds to 0."""
    if (percent := round(100 * share)) == 0:
        return
    axes.text(
        column, row, str(percent), ha="center", va="center", fontsize=8,
        color="white" if share > 0.5 else INK, weight="bold" if row == column else "normal",
    )  # fmt: skip


def _list(axes: Any, mistakes: Sequence[Mistake], names: Sequence[str]) -> None:
    title(axes, "Most often confused")
    if not mistakes:
        axes.text(0, 0.95, "nothing", fontsize=8.5, color=INK, va="top", transform=axes.transAxes)
    for at, mistake in enumerate(mistakes):
        line = f"{mistake.share:>4.0%}   {names[mistake.true]} → {names[mistake.predicted]}"
        axes.text(0, 0.97 - at / LISTED, line, fontsize=8.5, color=INK, va="top", transform=axes.transAxes)
