"""The figures as a picture: a panel per case, a bar per peer as long as its time relative to the fastest."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench import report as tables
from bench.case import REFERENCE

OURS, FALLBACK, PEER = "#1b7f5c", "#8cc9b1", "#b8bec6"
COLUMNS = 2


def plot(path: Path, report: dict) -> None:
    """Write the picture of a report."""
    cases = report["cases"]
    rows = max(1, math.ceil(len(cases) / COLUMNS))
    height = 0.9 + rows * max(2.7, 0.4 * max((len(case["peers"]) for case in cases), default=0))
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(13, height), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axes, case in zip(panels, cases, strict=False):
        _panel(axes, case)
    for axes in panels[len(cases) :]:
        axes.axis("off")
    where = tables.headline(report).split("; ")
    figure.suptitle(
        "Median time relative to the fastest, shorter is better\n",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
    )
    figure.text(
        0.01,
        1 - 0.315 / height,
        "; ".join([where[0], *where[2:]]),
        ha="left",
        va="top",
        fontsize=9.5,
        color="#555b63",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Axes, case: dict) -> None:
    peers = case["peers"]
    positions = range(len(peers))
    ratios = [peer["times_fastest"] for peer in peers]
    axes.barh(positions, ratios, color=[_colour(peer) for peer in peers], height=0.68)
    for y, peer in zip(positions, peers, strict=True):
        extra = peer["extra_memory_mb"]
        memory = "" if extra is None else ", < 1 MB" if extra < 1 else f", {extra:.0f} MB"
        axes.text(
            peer["times_fastest"] + 0.012 * max(ratios), y,
            f"{peer['times_fastest']:.1f}x   {tables.duration(peer['p50_ms'])}{memory}",
            va="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(positions, [peer["name"] for peer in peers])
    for label, peer in zip(axes.get_yticklabels(), peers, strict=True):
        label.set_fontweight("bold" if peer["ours"] else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(ratios))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_title(f"{case['op']}   {case['label']}", loc="left", fontsize=10)


def _colour(peer: dict) -> str:
    if peer["name"] == REFERENCE:
        return FALLBACK
    return OURS if peer["ours"] else PEER
