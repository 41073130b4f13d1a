"""info_nce along one axis at a time, from N=256, K=65536, C=128, T=0.07: ``python -m bench --sweep``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from rich.progress import Progress

from bench import bench_info_nce, device, measure, report
from bench.case import OFFICIAL, OURS
from bench.collect import measure_case

SECONDS = 0.5  # of timing per point
# Axes by device, and the point where they meet.
AXES = {
    "cuda": {
        "N": [32, 64, 128, 256, 512, 1024, 2048, 4096],
        "K": [4096, 16384, 65536, 262144, 1048576],
        "C": [32, 64, 128, 256, 512],
        "T": [0.02, 0.05, 0.07, 0.2, 1.0],
    },
    "cpu": {
        "N": [32, 64, 128, 256],
        "K": [4096, 16384, 65536],
        "C": [32, 128, 512],
        "T": [0.02, 0.07, 1.0],
    },
}
CENTRE = {"cuda": {"N": 256, "K": 65536, "C": 128}, "cpu": {"N": 64, "K": 16384, "C": 128}}
QUICK_AXES = {"N": [4, 8], "K": [64, 500], "C": [16], "T": [0.07]}
QUICK_CENTRE = {"N": 8, "K": 64, "C": 16}


def collect(quick: bool, where: torch.device, progress: Progress) -> dict:
    """Time every peer at every point; a peer that does not run or is wrong there is missing there."""
    axes = QUICK_AXES if quick else AXES[where.type]
    centre = (QUICK_CENTRE if quick else CENTRE[where.type]) | {"T": bench_info_nce.TEMPERATURE}
    about = device.describe(measure.use_threads(), where)
    points: dict[str, list[dict]] = {axis: [] for axis in axes}
    missing: dict[tuple[str, str], list[str]] = {}  # points by peer and reason
    known: dict[tuple, dict[str, float]] = {}  # the axes meet in one point
    task = progress.add_task("sweep", total=sum(map(len, axes.values())))
    for axis, values in axes.items():
        for value in values:
            at = centre | {axis: value}
            where_at = ", ".join(f"{name}={figure:g}" for name, figure in at.items())
            progress.update(task, description=f"sweep: {where_at}")
            key = tuple(at.values())
            if key not in known:
                known[key], reasons = _point(at, where, SECONDS if not quick else 0.01)
                for reason in reasons.items():
                    missing.setdefault(reason, []).append(where_at)
            points[axis].append({"value": value, "p50_ms": known[key]})
            progress.advance(task)
    notes = [
        f"Not measured{'' if len(places) == len(known) else ' at ' + '; '.join(places)}: {name} ({why})."
        for (name, why), places in missing.items()
    ]
    return {"device": about, "quick": quick, "centre": centre, "axes": points, "notes": notes}


def _point(at: dict, where: torch.device, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Medians by peer, from a cold cache and without launches where a CUDA graph takes them out."""
    size = at["N"], at["K"], at["C"]
    case = bench_info_nce.case.__wrapped__(size, where, at["T"])
    # Wrong at one end of a sweep is a finding, not the end of the run.
    result = measure_case(case, where, {}, seconds)
    reasons = result["absent"] | result["failed"]
    return {peer["name"]: peer["kernel_ms"] for peer in result["peers"]}, reasons


def plot(path: Path, figures: dict) -> None:
    """A panel per axis, a line per peer; ours are thick."""
    names = {name: None for points in figures["axes"].values() for p in points for name in p["p50_ms"]}
    colours = dict(zip(names, plt.get_cmap("tab20").colors * 2, strict=False))
    figure, grid = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    for axes, (axis, points) in zip(grid.flat, figures["axes"].items(), strict=True):
        for name in names:
            line = [(p["value"], p["p50_ms"][name]) for p in points if name in p["p50_ms"]]
            if line:
                bold = name.startswith(OURS)
                axes.plot(
                    *zip(*line, strict=True), label=name, color=colours[name], marker="o", markersize=4,
                    linewidth=2.8 if bold else 1.2, linestyle="--" if name == OFFICIAL else "-",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        values = [p["value"] for p in points]
        axes.set_xticks(values, [f"{value:g}" if axis == "T" else f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda ms, position: report.duration(ms))
        fixed = ", ".join(f"{k}={v:g}" for k, v in figures["centre"].items() if k != axis)
        axes.set_title(f"{axis}   ({fixed})", loc="left", fontsize=11)
        axes.set_ylabel("median")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    about = figures["device"]
    figure.suptitle(
        f"info_nce and its gradient   {about['processor']}, torch {about['torch']}, {about['date'][:10]}",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
