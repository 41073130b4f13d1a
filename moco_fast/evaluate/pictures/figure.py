"""What all pictures share: colours, figures of their own, and files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moco_fast.extras import extra
from moco_fast.files import whole

INK, FAINT = "#24292f", "#d0d7de"
BLUE, ORANGE, GREEN, RED, GREY = "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8c959f"
DPI = 150


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A figure of so many inches, made without pyplot: nothing global changes, and no display is needed."""
    return extra("matplotlib.figure").Figure(figsize=(width, height), **options)


def plain(axes: Any) -> None:
    """Light grid, no box."""
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=0)


def title(axes: Any, text: str) -> None:
    """A heading above the left edge."""
    axes.set_title(text, fontsize=10, color=INK, loc="left", weight="bold")


def printable(text: str, length: int | None = None) -> str:
    """The text as it is, for matplotlib, which takes what is between dollars for a formula and draws UTF-8
    alone; cut to so many characters."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if length is not None and len(text) > length:
        text = text[: length - 1] + "…"
    return text.replace("$", r"\$")


def save(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    with whole(path) as aside:
        figure.savefig(aside, format="png", dpi=DPI, facecolor="white")
