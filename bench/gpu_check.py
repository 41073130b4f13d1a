"""Everything that needs a GPU, in one command and under 8 minutes: ``python3 bench/gpu_check.py``.

Builds the package in place, runs the tests marked ``gpu``, the kernels at small
shapes under compute-sanitizer, and the benchmark; then prints one table. Needs
no package registry: torch, triton, pytest, setuptools, pybind11 and ninja have
to be there. A stage that fails or runs out of time does not stop the next one.
Exits with 0 if all went well, 1 if a stage failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 470.0  # seconds for everything
REFERENCE = "moco_fast reference"  # PyTorch, whose times say nothing of the kernels

# What the kernels are built to reach on an H200, in us: op, start of the label of its case.
AIMS = {
    ("info_nce", "N=32,"): 8,
    ("info_nce", "N=256,"): 16,
    ("info_nce", "N=1024,"): 64,
    ("ema_update_", "resnet50 with MLP"): 85,
    ("fused step", "SGD + EMA"): 200,
    ("nt_xent", "2N=8192,"): 100,
    ("two_crops", ""): 150,
}


@dataclass(frozen=True)
class Stage:
    """A command with a time limit; ``tool`` is an executable it cannot do without."""

    name: str
    command: Sequence[str]
    limit: float
    tool: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    result: str  # of a stage: passed, failed, out of time, absent; of an aim: met, missed, not measured
    seconds: float | None = None
    figure: str = ""
    aim: str = ""

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "out of time")


def stages(out: Path) -> list[Stage]:
    """What is run, in order."""
    python = sys.executable
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    sanitizer = "compute-sanitizer"
    # Most of the tests' time goes into compiling kernels, which several processes do at once.
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [
        Stage("build", [python, "-m", "pip", "install", "--quiet", *offline, "--editable", "."], 170),
        Stage("tests", [python, "-m", "pytest", "tests", "-m", "gpu", "-q", *parallel], 200),
        *(
            Stage(
                tool,
                [sanitizer, "--tool", tool, "--error-exitcode", "1", python, "-m", "bench.sanitize"],
                70,
                sanitizer,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage("benchmark", [python, "-m", "bench", "--device", "cuda", "--out", str(out)], 240),
    ]


def gpu() -> str | None:
    """Name of the GPU; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run(stage: Stage, remaining: float, log: Path) -> Row:
    """Run one stage, its output to the log."""
    if stage.tool and not shutil.which(stage.tool):
        return Row(stage.name, "absent", figure=f"{stage.tool} is not installed")
    limit = min(stage.limit, remaining)
    if limit < 1:
        return Row(stage.name, "out of time", 0.0, "no time was left to start it")
    begin = time.monotonic()
    with log.open("a+", encoding="utf-8", errors="replace") as stream:
        stream.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
        stream.flush()
        start = stream.tell()
        # A session of its own, so that what the command started ends with it.
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            result = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = "out of time"
        stream.seek(start)
        lines = [line.strip() for line in stream.read().splitlines() if line.strip()]
    figure = lines[-1][:100] if lines else ""
    if result == "failed":
        print("\n".join(lines[-25:]))
    return Row(stage.name, result, time.monotonic() - begin, figure)


def against_aims(cases: list[dict]) -> Iterator[Row]:
    """Our fastest kernel of every case that has an aim: device time from a cold L2."""
    for (op, label), aim in AIMS.items():
        found = [
            (peer["kernel_ms"] * 1e3, peer["name"])
            for case in cases
            if case["op"] == op and case["label"].startswith(label)
            for peer in case["peers"]
            if peer["ours"] and not peer["name"].startswith(REFERENCE)
        ]
        name = f"{op} {label}".strip(" ,")
        if found:
            us, peer = min(found)
            yield Row(name, "met" if us <= aim else "missed", None, f"{us:.1f} us, {peer}", f"{aim} us")
        else:
            yield Row(name, "not measured", aim=f"{aim} us")


def table(rows: list[Row]) -> str:
    """Plain text, a line per row."""
    cells = [["check", "result", "seconds", "figure", "aim"]]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append([row.check, row.result, seconds, row.figure, row.aim])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(c, widths, strict=True)) for c in cells)
    return "\n".join(line.rstrip() for line in lines)


def benchmark_cases(out: Path, since: float) -> list[dict]:
    """Cases of the benchmark's report in ``out``; none if none was written since then."""
    for path in out.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_mtime >= since else {}
        if "cases" in report:
            return report["cases"]
    return []


def main(arguments: list[str] | None = None) -> int:
    """Run all stages, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR")
    out = parser.parse_args(arguments).out.resolve()
    name = gpu()
    if name is None:
        print("gpu-check: torch finds no GPU here, so nothing was checked")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    log.write_text("", encoding="utf-8")
    started = log.stat().st_mtime
    begin = time.monotonic()
    rows = []
    for stage in stages(out):
        print(f"{stage.name} ...", flush=True)
        rows.append(run(stage, LIMIT - (time.monotonic() - begin), log))
        print(f"{stage.name}: {rows[-1].result}", flush=True)
    rows += against_aims(benchmark_cases(out, started))
    (out / "gpu-check.json").write_text(
        json.dumps({"gpu": name, "rows": [asdict(row) for row in rows]}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"\n{name}, {time.monotonic() - begin:.0f} s; report and log in {out}\n\n{table(rows)}")
    return int(any(row.bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
