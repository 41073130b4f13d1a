"""Everything that needs a GPU, in one command and under 8 minutes: ``python3 bench/gpu_check.py``.

Builds the package in place and sees that its CUDA part was built; checks and
times every op, a process each; runs the tests marked ``gpu``, the kernels at small
shapes, plain and under compute-sanitizer, and a whole training step; prints one table.
Needs no package registry: torch, triton, torchvision, pytest, setuptools, pybind11,
ninja, numpy, rich and matplotlib have to be there. A stage that fails or runs out of
time does not stop the next one, and what was found is written after each. Exits with
0 if all went well, 1 if a stage failed, 2 without a GPU.
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
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script it has bench/ on its path, where torch would take bench/cuda.py for the package cuda.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT / "bench"]

LIMIT = 470.0  # seconds for everything
CUDA_BIN = "/usr/local/cuda/bin"  # of nvcc and compute-sanitizer, where PATH leaves it out
REFERENCE = "moco_fast reference"  # PyTorch, whose times say nothing of the kernels

# What the kernels are built to reach on an H200, in us: op, start of the label of its case.
AIMS = {
    ("info_nce", "N=32,"): 8,
    ("info_nce", "N=256,"): 16,
    ("info_nce", "N=1024,"): 64,
    ("ema_update_", "resnet50 with MLP"): 85,
    ("fused step", "SGD + EMA"): 200,
    ("nt_xent", "2N=8192,"): 100,
    ("augment", "two crops of 256,"): 150,
}


# Ops of the benchmark, those with an aim first, and the seconds of each; a start takes about six of them.
OPS = {
    "info_nce": 17,
    "ema_update_": 10,
    "fused step": 12,
    "nt_xent": 12,
    "contrast": 12,
    "dino": 14,
    "enqueue_": 9,
    "split_batch_norm": 19,
    "take_rows": 10,
    "augment": 10,
}
NATIVE = """
from moco_fast import native
from moco_fast.native.compiled import _C
assert _C and _C.has_cuda, native.unavailable() or native.build_info()
assert _C.cuda_devices(), "its CUDA runtime finds no device"
print(_C.cuda_devices())
"""


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take; what it leaves of them those after it may use.

    Attributes:
        tool: an executable it cannot do without.
        least: seconds without which it is left out, which is no failure.
        grace: seconds between SIGINT, at which pytest says what failed, and SIGKILL.
    """

    name: str
    command: Sequence[str]
    seconds: float
    tool: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    least: float = 0.0
    grace: float = 5.0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    # Of a stage: passed, failed, out of time, absent, left out. Of an aim: met, missed, not measured.
    result: str
    seconds: float | None = None
    figure: str = ""
    aim: str = ""

    @property
    def bad(self) -> bool:
        return self.result in ("failed", "out of time")


def stages(out: Path, figures: Path) -> list[Stage]:
    """What is run, in order: first what most depends on.

    Args:
        out: where results go.
        figures: where the processes of the benchmark add up theirs.
    """
    python, module = sys.executable, [sys.executable, "-m"]
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    bench = [*module, "bench", "--device", "cuda", "--own"]
    timing = ["--seconds", "1.5", "--add", "--out", str(figures)]
    # Most of the tests' time goes into compiling kernels, which several processes do at once.
    parallel = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # What failed as it fails, and last of all by name; a file that cannot be imported stops no other.
    verbose = ["-p", "bench.gpu_tests", "-v", "--tb=short", "-rfE", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that waits for itself never ends
        verbose += ["--timeout", "60", "--timeout-method", "thread"]
    sanitizer = "compute-sanitizer"
    # In the blocks of torch's allocator nothing is out of bounds; probing for an API is no error.
    tools = {
        "memcheck": (["--report-api-errors", "no"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        "racecheck": ([], {}),
    }
    return [
        Stage("build", [*module, "pip", "install", "--quiet", *offline, "--editable", "."], 65),
        Stage("CUDA part", [python, "-c", NATIVE], 15),
        # All results against float64, several ops at once: it compiles the kernels that are timed next.
        Stage("results", [*module, "bench.each", "9", *bench, "--check", "--ops"], 75),
        *(Stage(f"time {op}", [*bench, *timing, "--ops", op], seconds) for op, seconds in OPS.items()),
        Stage(
            "tests",
            [*module, "pytest", "tests", "-m", "gpu", *verbose, *parallel],
            85,
            environment={
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it deterministic products raise
                # The processes share the cores.
                "OMP_NUM_THREADS": "2",
                "GOMP_SPINCOUNT": "2000",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
            },
            grace=15.0,  # xdist takes ten of them
        ),
        # The sanitizers find the kernels compiled.
        Stage("small shapes", [*module, "bench.each", "9", *module, "bench.sanitize", "--ops"], 30),
        *(
            Stage(
                tool,
                [
                    *(*module, "bench.each", "9"),
                    *(sanitizer, "--tool", tool, *options, "--error-exitcode", "1"),
                    *(*module, "bench.sanitize", "--ops"),
                ],
                30,
                sanitizer,
                environment,
            )
            for tool, (options, environment) in tools.items()
        ),
        Stage(
            "training step",
            [*module, "bench.step", "--device", "cuda", "--configs", "resnet50-256-bf16", "--out", str(out)],
            15,
            least=45,
        ),
    ]


def gpu() -> str | None:
    """Name of the GPU; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run(stage: Stage, limit: float, log: Path) -> Row:
    """Run one stage, its output to the log, for at most ``limit`` seconds."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), CUDA_BIN])
    if stage.tool and not shutil.which(stage.tool, path=path):
        return Row(stage.name, "absent", figure=f"{stage.tool} is not installed")
    if limit < stage.least:
        return Row(stage.name, "left out", 0.0, f"{limit:.0f} s were left, it needs {stage.least:.0f}")
    if limit < 1:
        return Row(stage.name, "out of time", 0.0, "no time was left to start it")
    begin = time.monotonic()
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    with log.open("a+", encoding="utf-8", errors="replace") as stream:
        stream.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
        stream.flush()
        start = stream.tell()
        # A session of its own, so that what the command started ends with it.
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            result = "out of time"
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(stage.grace)
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may hold what waits for its GPU
                process.wait(stage.grace)
        stream.seek(start)
        lines = [line.strip() for line in stream.read().splitlines() if line.strip()]
    if result != "passed":
        print("\n".join(lines[-25:]))
    return Row(stage.name, result, time.monotonic() - begin, lines[-1][:100] if lines else "")


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


def collect_figures(figures: Path, out: Path) -> list[dict]:
    """Copy what the benchmark has written so far, and return its cases."""
    found = []
    for path in (*figures.glob("[!.]*.json"), *figures.glob("[!.]*.png")):  # .* is being written
        shutil.copy(path, out)
        if path.suffix == ".json":
            found += json.loads(path.read_text(encoding="utf-8"))["cases"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all stages, print the table, return the exit code."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "build" / "gpu-check"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="default: build/gpu-check")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STAGE",
        help='after the build these stages, or those that begin so, such as "time"; in all the time there is',
    )  # fmt: skip
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    name = gpu()
    if name is None:
        print("gpu-check: torch finds no GPU here, so nothing was checked")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    log.write_text("", encoding="utf-8")
    done: list[Row] = []
    due = begin
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder)
        chosen = [
            stage
            for stage in stages(out, figures)
            if not options.only or stage.name.startswith(("build", *options.only))
        ]
        # What other stages would take goes to those chosen.
        share = LIMIT / sum(stage.seconds for stage in chosen) if options.only else 1.0
        for stage in chosen:
            print(f"{stage.name} ...", flush=True)
            due += stage.seconds * share
            done.append(run(stage, due - time.monotonic(), log))
            print(f"{stage.name}: {done[-1].result}", flush=True)
            rows = [*done, *against_aims(collect_figures(figures, out))]
            text = json.dumps({"gpu": name, "rows": [asdict(row) for row in rows]}, indent=2)
            (out / "gpu-check.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{name}, {time.monotonic() - begin:.0f} s; report and log in {out}\n\n{table(rows)}")
    return int(any(row.bad for row in rows))


if __name__ == "__main__":
    sys.exit(main())
