"""Run every case and gather its figures into one dict, the content of ``results/<device>.json``."""

from __future__ import annotations

from typing import Any

import torch
from rich.progress import Progress, TaskID

from bench import device, measure, memory
from bench.case import OFFICIAL, OURS, Case
from bench.ops import OPS

SECONDS, QUICK_SECONDS = 15.0, 0.2  # of timing per case

NOTES = (
    "Peers take turns, one call each per round, and every call starts from a cold cache.",
    "Extra memory is the growth of the peak resident size over a warm call in a fresh process.",
    "The share of the roofline counts the operations and bytes of the formula, against the copy bandwidth "
    "and the torch.mm rate of the same run; an op that writes less than it reads can pass 100 %.",
    "vs official: how many times faster than the official formula; of fastest: times the fastest median.",
    "Errors are relative, against float64.",
)


def collect(quick: bool, progress: Progress) -> dict:
    """Measure everything.

    Args:
        quick: tiny sizes, for a smoke run; its times mean nothing.
        progress: shows what is running.

    Raises:
        WrongResult: a peer disagrees with float64; nothing wrong is ever timed.
    """
    threads = measure.use_threads()
    about = device.describe(threads)
    task = progress.add_task("memory, in a fresh process", total=len(OPS))
    extra = {}
    for op, figures in memory.by_op(quick):
        extra[op] = figures
        progress.advance(task)

    results, roof = [], None
    for op, module in OPS.items():
        task = progress.add_task(f"{op}: preparing", total=None)
        for case in module.cases(quick):
            # Beside each case, not once: a shared machine is slower at some moments than at others.
            now = measure.roofline(quick)
            roof = now if roof is None else roof.raised_by(now)
            figures = extra.get(op, {}).get(case.label, {})
            results.append(_case(case, figures, QUICK_SECONDS if quick else SECONDS, progress, task))
            task = progress.add_task(f"{op}: preparing", total=None)
        progress.remove_task(task)

    assert roof is not None  # every op has a case
    for result in results:
        for peer in result["peers"]:
            seconds = peer["p50_ms"] / 1e3
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
    lines = list(NOTES)
    absent = {(result["op"], name, why): None for result in results for name, why in result["absent"].items()}
    lines += [f"Not measured for {op}: {name} ({why})." for op, name, why in absent]
    if torch.cuda.is_available():
        lines.append("GPU kernels are not part of this version: the CPU was measured, the GPU was not used.")
    if about["load"] > about["cpus"] / 2:
        lines.append(
            f"The machine was busy when the run began (load {about['load']:.1f} on {about['cpus']} CPUs): "
            "the times are longer, and further apart, than on an idle one."
        )
    if quick:
        lines.append("Smoke run with tiny sizes: the times mean nothing.")
    return lines


def _case(
    case: Case,
    extra: dict[str, int],  # bytes by peer
    seconds: float,
    progress: Progress,
    task: TaskID,
) -> dict[str, Any]:
    """Check every peer, time them together, and put the figures of each side by side."""
    progress.update(task, description=f"{case.op}: {case.label}: checking", total=1.0)
    errors = {name: case.check(name) for name in case.peers}
    progress.update(task, description=f"{case.op}: {case.label}")
    times = measure.interleave(
        {name: peer.run for name, peer in case.peers.items()},
        seconds,
        lambda fraction: progress.update(task, completed=fraction),
    )
    spread = {name: measure.percentiles(values) for name, values in times.items()}
    fastest = min(middle for _, middle, _ in spread.values())
    peers = [
        {
            "name": name,
            "ours": name.startswith(OURS),
            "p20_ms": low * 1e3,
            "p50_ms": middle * 1e3,
            "p80_ms": high * 1e3,
            "times_fastest": middle / fastest,
            "speedup_over_official": spread[OFFICIAL][1] / middle,
            "extra_memory_mb": extra[name] / 1e6 if name in extra else None,
            "product": case.peers[name].product,
            "errors": errors[name],
        }
        for name, (low, middle, high) in spread.items()
    ]
    return {
        "op": case.op,
        "label": case.label,
        "flops": case.flops,
        "bytes": case.bytes,
        "rounds": len(times[OFFICIAL]),
        "absent": case.absent,
        "peers": sorted(peers, key=lambda peer: peer["p50_ms"]),
    }
