"""Run every case and gather its figures into one dict, the content of ``results/<device>.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress

from bench import cuda, device, measure, memory
from bench.case import OFFICIAL, OURS, Absent, Case
from bench.ops import OPS
from bench.roofline import Roofline, roofline

SECONDS, GPU_SECONDS, QUICK_SECONDS = 15.0, 3.0, 0.2  # of timing per case

NOTES = (
    "Peers take turns, one call each per round, and every call starts from a cold cache.",
    "The share of the roofline counts the operations and bytes of the formula, against the copy bandwidth "
    "and the torch.mm rate of the same run; an op that writes less than it reads can pass 100 %.",
    "vs official: how many times faster than the official formula; of fastest: times the fastest median.",
    "Errors are relative, against float64.",
)
CPU_NOTES = ("Extra memory is the growth of the peak resident size over a warm call in a fresh process.",)
GPU_NOTES = (
    "Extra memory is what a warm call allocates at its peak beyond what was allocated before it.",
    "A call is launched on an idle GPU, and the launches count; graph is the same call replayed from a CUDA "
    "graph, device time alone, by which GB/s, TFLOP/s and the roofline are given; warm is right after the "
    "same call.",
)


def collect(quick: bool, where: torch.device, progress: Progress) -> dict:
    """Measure everything.

    Args:
        quick: tiny sizes, for a smoke run; its times mean nothing.
        where: the device that is measured.
        progress: shows what is running.

    Raises:
        WrongResult: a peer disagrees with float64; nothing wrong is ever timed.
    """
    about = device.describe(measure.use_threads(), where)
    extra = {}
    if where.type == "cpu":
        task = progress.add_task("memory, in a fresh process", total=len(OPS))
        for op, figures in memory.by_op(quick):
            extra[op] = figures
            progress.advance(task)

    results: list[dict] = []
    roof: Roofline | None = None
    seconds = QUICK_SECONDS if quick else GPU_SECONDS if where.type == "cuda" else SECONDS
    for op, module in OPS.items():
        task = progress.add_task(f"{op}: preparing", total=None)
        for case in module.cases(quick, where):
            # Beside each case, not once: a shared machine is slower at some moments than at others.
            now = roofline(where, quick)
            roof = now if roof is None else roof.raised_by(now)
            progress.update(task, description=f"{case.op}: {case.label}", total=1.0)
            figures = extra.get(op, {}).get(case.label, {})
            tell = lambda fraction, task=task: progress.update(task, completed=fraction)  # noqa: E731
            results.append(measure_case(case, where, figures, seconds, tell))
            task = progress.add_task(f"{op}: preparing", total=None)
        progress.remove_task(task)

    assert roof is not None  # there are ops, and they have cases
    for result in results:
        for peer in result["peers"]:
            seconds = peer["kernel_ms"] / 1e3
            peer["gb_per_s"] = result["bytes"] / seconds / 1e9
            peer["tflop_per_s"] = result["flops"] / seconds / 1e12
            peer["roofline_share"] = roof.share(result["flops"], result["bytes"], peer["product"], seconds)
    return {
        "device": about,
        "quick": quick,
        "roofline": {
            "copy_gb_per_s": roof.copy / 1e9,
            "tflop_per_s": {k: v / 1e12 for k, v in roof.products.items()},
        },
        "cases": results,
        "notes": notes(about, results, quick),
    }


def notes(about: dict, results: list[dict], quick: bool) -> list[str]:
    """What a reader has to know: how it was measured, what was not, and what made it worse."""
    lines = [*NOTES, *(GPU_NOTES if about["type"] == "cuda" else CPU_NOTES)]
    absent = {(result["op"], name, why): None for result in results for name, why in result["absent"].items()}
    lines += [f"Not measured for {op}: {name} ({why})." for op, name, why in absent]
    uncaptured = {
        (result["op"], peer["name"], peer["no_graph"]): None
        for result in results
        for peer in result["peers"]
        if peer["no_graph"]
    }
    lines += [f"Not in a CUDA graph, {op}: {name} ({why})." for op, name, why in uncaptured]
    if about["load"] > about["cpus"] / 2:
        lines.append(
            f"The machine was busy when the run began (load {about['load']:.1f} on {about['cpus']} CPUs): "
            "the times are longer, and further apart, than on an idle one."
        )
    if quick:
        lines.append("Smoke run with tiny sizes: the times mean nothing.")
    return lines


def measure_case(
    case: Case,
    where: torch.device,
    extra: dict[str, int],  # bytes by peer, of a CPU
    seconds: float,
    progress: Callable[[float], object] = lambda fraction: None,
    missing: tuple[type[Exception], ...] = (Absent,),
) -> dict[str, Any]:
    """Check every peer, time those that run here together, and put the figures of each side by side.

    A peer whose check raises one of ``missing`` is left out, and listed with the reason.
    """
    errors, absent = {}, dict(case.absent)
    for name in case.peers:
        try:
            errors[name] = case.check(name)
        except missing as reason:
            absent[name] = str(reason)
    runs = {name: case.peers[name].run for name in errors}
    if where.type == "cuda":
        extra = {name: cuda.peak_extra(run, where) for name, run in runs.items()}
    timers, no_graph = {}, {}
    for name, run in runs.items():
        modes, no_graph[name] = measure.timers(run, where)
        timers |= {(name, mode): timer for mode, timer in modes.items()}

    times = measure.interleave(timers, seconds, progress)
    modes_of: dict[str, dict[str, dict[str, float]]] = {name: {} for name in runs}
    for (name, mode), values in times.items():
        modes_of[name][mode] = measure.percentiles(values)
    cold = {name: modes[measure.COLD]["p50_ms"] for name, modes in modes_of.items()}
    peers = [
        {
            "name": name,
            "ours": name.startswith(OURS),
            **modes[measure.COLD],
            # Without launches, where they could be taken out.
            "kernel_ms": modes.get(cuda.GRAPH_COLD, modes[measure.COLD])["p50_ms"],
            "modes": modes,
            "no_graph": no_graph[name],
            "times_fastest": cold[name] / min(cold.values()),
            "speedup_over_official": cold[OFFICIAL] / cold[name],
            "extra_memory_mb": extra[name] / 1e6 if name in extra else None,
            "product": case.peers[name].product,
            "errors": errors[name],
        }
        for name, modes in modes_of.items()
    ]
    return {
        "op": case.op,
        "label": case.label,
        "flops": case.flops,
        "bytes": case.bytes,
        "rounds": len(times[OFFICIAL, measure.COLD]),
        "absent": absent,
        "peers": sorted(peers, key=lambda peer: peer["p50_ms"]),
    }
