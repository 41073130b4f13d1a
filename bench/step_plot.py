"""The breakdown of training steps as a picture: a panel per size, a stacked bar per way."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench import report
from bench.stages import STAGES

COLOURS = dict(
    zip(STAGES, ("#b8bec6", "#1b7f5c", "#d98c3f", "#7a6fb0", "#4f9bd9", "#8a8f98", "#e0e3e7"), strict=True)
)


def plot(path: Path, figures: dict) -> None:
    """Write the picture of a report of ``bench.step``."""
    results = figures["configs"]
    columns = min(2, len(results))
    rows = math.ceil(len(results) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(8 * columns, 1.6 + 2.2 * rows), squeeze=False, layout="constrained"
    )
    for axes, result in zip(grid.flat, results, strict=False):
        ways = result["ways"]
        for y, way in enumerate(ways):
            left = 0.0
            for stage, ms in (way["stages_ms"] or {"encoders": way["p50_ms"]}).items():
                axes.barh(y, ms, left=left, color=COLOURS[stage], height=0.68, label=stage)
                left += ms
            axes.text(
                left, y, f"  {report.duration(way['p50_ms'])}, tax {way['tax']:.2f}", va="center", fontsize=9
            )
        axes.set_yticks(range(len(ways)), [way["name"] for way in ways])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.4 * max(max(way["p50_ms"], sum(way["stages_ms"].values())) for way in ways))
        axes.set_xlabel("ms")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(result["label"], loc="left", fontsize=10)
    for axes in grid.flat[len(results) :]:
        axes.axis("off")
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in STAGES]
    figure.legend(patches, STAGES, loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    about = figures["device"]
    figure.suptitle(
        f"One training step\n{about['processor']}, torch {about['torch']}, {about['date'][:10]}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
