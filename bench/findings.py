"""What a run of the benchmark has found so far, and the report it makes of that at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.ops import OPS
from bench.roofline import Roofline

NOTES = (
    "Peers take turns, one call each per round, and every call starts from a cold cache.",
    "The share of the roofline counts the operations and bytes of the formula, against the copy bandwidth "
    "and the torch.mm rate of the same run. Neither is a peak: an op that writes less than it reads, or one "
    "whose products are of better shapes than torch.mm's, can pass 100 %.",
    "vs official: how many times faster than the official formula; of fastest: times the fastest median.",
    "Errors are relative, against float64.",
)
CPU_NOTES = (
    "Extra memory is the growth of the peak resident size over a warm call, in a process that times nothing.",
    "moco_fast native writes results of 4 MB and more into huge pages, which other ways get only with "
    "PyTorch's THP_MEM_ALLOC_ENABLE=1.",
)
GPU_NOTES = (
    "Extra memory is what a warm call allocates at its peak beyond what was allocated before it.",
    "A call is launched on an idle GPU, and the launches count; graph is the same call replayed from a CUDA "
    "graph, device time alone, by which GB/s, TFLOP/s and the roofline are given; warm is right after the "
    "same call.",
)


@dataclass
class Findings:
    """What was measured so far."""

    about: dict[str, Any]
    quick: bool
    results: list[dict] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)  # op, label and why of what has no result
    roof: Roofline = field(default_factory=lambda: Roofline(0.0, {}))
    empty_graph_us: float | None = None

    def add(self, report: dict, but: Sequence[str]) -> None:
        """Take over an earlier report, ``but`` these ops."""
        self.results += [case for case in report["cases"] if case["op"] not in but]
        self.failed += [one for one in report.get("failed", []) if one["op"] not in but]
        roof = report["roofline"]
        products = {name: rate * 1e12 for name, rate in roof["tflop_per_s"].items()}
        self.roof = self.roof.raised_by(Roofline(roof["copy_gb_per_s"] * 1e9, products))

    def report(self, finished: bool) -> dict:
        """All of it, as it is written."""
        results = sorted(self.results, key=lambda result: list(OPS).index(result["op"]))
        for result in results:
            for peer in result["peers"]:
                seconds = peer["kernel_ms"] / 1e3
                nbytes = peer.get("bytes") or result["bytes"]
                peer["gb_per_s"] = nbytes / seconds / 1e9
                peer["tflop_per_s"] = result["flops"] / seconds / 1e12
                peer["roofline_share"] = self.roof.share(result["flops"], nbytes, peer["product"], seconds)
        return {
            "device": self.about,
            "quick": self.quick,
            "roofline": {
                "copy_gb_per_s": self.roof.copy / 1e9,
                "tflop_per_s": {name: rate / 1e12 for name, rate in self.roof.products.items()},
            },
            "empty_graph_us": self.empty_graph_us,
            "cases": results,
            "failed": self.failed,
            "notes": notes(self, finished),
        }


def _absent(results: Sequence[dict]) -> dict[tuple[str, str], str]:
    """Where a way was not measured, by its name and the reason: whole ops, or the sizes of one."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for result in results:
        for lack in result["absent"].items():
            found.setdefault(lack, {}).setdefault(result["op"], []).append(result["label"])
    sizes = Counter(result["op"] for result in results)
    return {
        lack: ", ".join(op if len(at) == sizes[op] else f"{op} {'; '.join(at)}" for op, at in ops.items())
        for lack, ops in found.items()
    }


def notes(findings: Findings, finished: bool) -> list[str]:
    """What a reader has to know: how it was measured, what was not, and what made it worse."""
    about, results = findings.about, findings.results
    lines = [*NOTES, *(GPU_NOTES if about["type"] == "cuda" else CPU_NOTES)]
    if findings.empty_graph_us is not None:
        lines.append(
            f"A graph of one kernel that does nothing takes {findings.empty_graph_us:.1f} us by the same "
            "clock; every figure of a graph holds as much."
        )
    lines += [f"FAILED: {one['op']}, {one['label']}: {one['why']}." for one in findings.failed]
    lines += [
        f"Not measured: {name} ({why}), for {where}." for (name, why), where in _absent(results).items()
    ]
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
    if findings.quick:
        lines.append("Smoke run with tiny sizes: the times mean nothing.")
    if not finished:
        lines.append("The run did not come to its end: cases are missing.")
    return lines
