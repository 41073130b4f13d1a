"""Bytes and time of a step over the number of processes, as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench import report

COLOURS = ("#8a8f98", "#d98c3f", "#1b7f5c")


def plot(path: Path, figures: dict) -> None:
    """Write the picture of a report of ``bench.ranks``."""
    worlds = figures["worlds"]
    names = [way["name"] for way in next(iter(worlds.values()))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    width = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(worlds))]
        megabytes = [sum(ways[i]["received"].values()) / 1e6 for ways in worlds.values()]
        middle = [ways[i]["p50_ms"] for ways in worlds.values()]
        low = [ways[i]["p50_ms"] - ways[i]["p20_ms"] for ways in worlds.values()]
        high = [ways[i]["p80_ms"] - ways[i]["p50_ms"] for ways in worlds.values()]
        for axes, bars in (
            (left, left.bar(places, megabytes, width, color=colour, label=name)),
            (right, right.bar(places, middle, width, yerr=(low, high), color=colour, ecolor="#444")),
        ):
            axes.bar_label(bars, fmt=report.digits, fontsize=8, padding=2)
    left.set_yscale("log")
    left.set_ylabel("MB that arrive at a rank")
    right.set_ylabel("ms per step")
    for axes in (left, right):
        axes.set_xticks(range(len(worlds)), [f"{world} processes" for world in worlds])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    about = figures["device"]
    cables = f", {figures['gbit']:g} Gb/s between any two" if figures["gbit"] else ""
    figure.suptitle(
        f"A step over processes{cables}\n{about['processor']}, torch {about['torch']}, {about['date'][:10]}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)
