"""Run every case and gather its figures into one dict, the content of ``results/<device>.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress

from bench import cuda, measure, memory
from bench.case import OFFICIAL, OURS, Absent, Case, WrongResult, reason, trusted
from bench.findings import Findings
from bench.ops import OPS, cases
from bench.roofline import roofline

SECONDS, GPU_SECONDS, QUICK_SECONDS = 15.0, 3.0, 0.2  # of timing per case


def collect(
    findings: Findings,
    where: torch.device,
    progress: Progress,
    ops: Sequence[str] = tuple(OPS),
    own: bool = False,
    seconds: float | None = None,
    save: Callable[[dict], object] = lambda report: None,
) -> dict:
    """Measure everything. What fails or is wrong is noted, never timed, and does not end the rest.

    Args:
        findings: gets the figures; says by ``quick`` whether sizes are tiny, and times mean nothing.
        where: the device that is measured.
        progress: shows what is running.
        ops: which of :data:`bench.ops.OPS`.
        own: leave out other people's ways.
        seconds: of timing per case; None: what the device is given by default.
        save: told the report after every case.
    """
    quick, extra = findings.quick, {}
    if seconds is None:
        seconds = QUICK_SECONDS if quick else GPU_SECONDS if where.type == "cuda" else SECONDS

    def keep() -> None:
        save(findings.report(finished=False))

    def fail(op: str, label: str, why: str) -> None:
        findings.failed.append({"op": op, "label": label, "why": why})
        keep()

    keep()
    try:
        if where.type == "cuda":
            findings.empty_graph_us = cuda.empty_graph(where) * 1e6
        else:
            task = progress.add_task("memory, in a fresh process", total=len(ops))
            for op, figures in memory.by_op(quick, own, ops):
                extra[op] = figures
                progress.advance(task)
    except RuntimeError as error:
        fail("all ops", "empty graph" if where.type == "cuda" else "extra memory", reason(error))

    def visit(case: Case, tell: Callable[[float], object]) -> None:
        # Beside each case, not once: a shared machine is slower at some moments than at others.
        findings.roof = findings.roof.raised_by(roofline(where, quick))
        result = measure_case(case, where, extra.get(case.op, {}).get(case.label, {}), seconds, tell)
        findings.results.append(result)
        for name, why in result.pop("failed").items():
            fail(case.op, case.label, f"{name}: {why}")
        keep()

    walk(ops, quick, own, where, progress, visit, fail)
    report = findings.report(finished=True)
    save(report)
    return report


def check(
    quick: bool, where: torch.device, progress: Progress, ops: Sequence[str], own: bool
) -> list[dict[str, str]]:
    """Check every peer without timing it; returns what failed."""
    failed: list[dict[str, str]] = []

    def fail(op: str, label: str, why: str) -> None:
        failed.append({"op": op, "label": label, "why": why})

    def visit(case: Case, tell: Callable[[float], object]) -> None:
        for name, why in each_peer(case, case.check)[2].items():
            fail(case.op, case.label, f"{name}: {why}")

    walk(ops, quick, own, where, progress, visit, fail)
    return failed


def walk(
    ops: Sequence[str],
    quick: bool,
    own: bool,
    where: torch.device,
    progress: Progress,
    visit: Callable[[Case, Callable[[float], object]], None],
    fail: Callable[[str, str, str], None],
) -> None:
    """Visit all cases of the ops, one at a time; what raises is told to ``fail``, with op and label."""
    for op in ops:
        label = ""
        task = progress.add_task(f"{op}: preparing", total=None)
        try:
            for case in cases(op, quick, where, own):
                label = case.label
                progress.update(task, description=f"{op}: {label}", total=1.0)
                tell = lambda fraction, task=task: progress.update(task, completed=fraction)  # noqa: E731
                try:
                    visit(case, tell)
                except Exception as error:  # of a compiler, a launch, a driver: any type
                    fail(op, label, reason(error))
                del case  # freed before the next one is made
                task = progress.add_task(f"{op}: preparing", total=None)
        except Exception as error:  # of what makes the next case: likewise
            fail(op, f"the case after {label}" if label else "its first case", reason(error))
        progress.remove_task(task)


def each_peer(case: Case, use: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Use every peer of a case: what came of it by name, who does not run here, and who failed; and why."""
    done, absent, failed = {}, dict(case.absent), {}
    for name in case.peers:
        try:
            done[name] = use(name)
        except Exception as error:  # of a compiler, a launch, a driver: any type
            bad = trusted(name) and not isinstance(error, Absent)
            (failed if bad else absent)[name] = reason(error)
    return done, absent, failed


def measure_case(
    case: Case,
    where: torch.device,
    extra: dict[str, int],  # bytes by peer, of a CPU
    seconds: float,
    progress: Callable[[float], object] = lambda fraction: None,
) -> dict[str, Any]:
    """Check every peer, time those that run here together, and put the figures of each side by side.

    A peer that is wrong or does not run is left out, and listed with the reason under "absent", or under
    "failed" if it has to be right.

    Raises:
        WrongResult: the official formula is among them: there is nothing to compare with.
    """

    def prepare(name: str) -> tuple[dict[str, float], int | None, dict[str, measure.Timer], str | None]:
        errors, run = case.check(name), case.peers[name].run
        peak = cuda.peak_extra(run, where) if where.type == "cuda" else extra.get(name)
        return errors, peak, *measure.timers(run, where)

    ready, absent, failed = each_peer(case, prepare)
    if OFFICIAL not in ready:
        raise WrongResult("; ".join(f"{name}: {why}" for name, why in (failed or absent).items()))
    timers = {
        (name, mode): timer for name, (_, _, modes, _) in ready.items() for mode, timer in modes.items()
    }
    times = measure.interleave(timers, seconds, progress)
    modes_of: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ready}
    for (name, mode), values in times.items():
        modes_of[name][mode] = measure.percentiles(values)
    cold = {name: modes[measure.COLD]["p50_ms"] for name, modes in modes_of.items()}
    peers = []
    for name, (errors, peak, _, no_graph) in ready.items():
        modes = modes_of[name]
        peers.append(
            {
                "name": name,
                "ours": name.startswith(OURS),
                **modes[measure.COLD],
                # Without launches, where they could be taken out.
                "kernel_ms": modes.get(cuda.GRAPH_COLD, modes[measure.COLD])["p50_ms"],
                "modes": modes,
                "no_graph": no_graph,
                "times_fastest": cold[name] / min(cold.values()),
                "speedup_over_official": cold[OFFICIAL] / cold[name],
                "extra_memory_mb": None if peak is None else peak / 1e6,
                "product": case.peers[name].product,
                "bytes": case.peers[name].bytes,
                "errors": errors,
            }
        )
    return {
        "op": case.op,
        "label": case.label,
        "flops": case.flops,
        "bytes": case.bytes,
        "rounds": len(times[OFFICIAL, measure.COLD]),
        "absent": absent,
        "failed": failed,
        "peers": sorted(peers, key=lambda peer: peer["p50_ms"]),
    }
