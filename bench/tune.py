"""Measure the tile tables of the Triton kernels on this GPU: ``python -m bench.tune [OP ...]``.

A kernel file ``kernels/<op>.py`` that can be tuned has, in its module,

* ``TILES = {...}``: a literal dict, from a class of shapes to a tuple of tile sizes;
* ``CANDIDATES: dict[key, list[value]]``: what to try for a class;
* ``tune_case(key) -> Callable[[value], Callable[[], None]]``: makes the launch of a candidate.

Every candidate first runs once in one of as many processes as there are CPUs,
which leaves it compiled in Triton's cache on disk. Then those of a class take
turns, alone on the GPU, from a cold L2 and without launch overhead where a CUDA
graph takes it out. One that does not compile or run is skipped and listed. The
fastest go into the literals at the end, under a comment that says on what they
were measured; classes without figures keep their tiles. The results are not
checked here: run the tests afterwards.

With ``--out FILE`` every figure is in FILE as soon as its class is done, and a
FILE from before is continued. ``--apply FILE ...`` writes the literals from such
files, on any machine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import cuda, device, measure, report, tiles
from bench.case import reason
from bench.isolated import Processes
from moco_fast.bar import Bar

SECONDS = 1.0  # of timing per class of shapes
SHOWN = 5
HEADLINE_OP, HEADLINE_WIDTH = "info_nce", 128  # of the tables in the README
# Candidates that each process compiles before those that are ready are timed: with fewer most processes would
# wait for the slowest, with more nothing would be timed yet when time runs out.
PER_PROCESS = 4

Class = tuple[str, Hashable]  # op and key of CANDIDATES
Candidate = tuple[str, Hashable, tuple]  # and tiles
Compile = Callable[[list[Candidate]], Iterable[str | None]]  # the reason that one cannot run, by candidate


def name(key: Hashable) -> str:
    """A class of shapes as the command line has it."""
    return ",".join(map(str, key)) if isinstance(key, tuple) else str(key)


def classes(ops: list[str], names: list[str]) -> list[Class]:
    """What to measure: of these ops the classes of these names, or all; what matters most first.

    Raises:
        ValueError: an op cannot be tuned, or no class has such a name.
    """
    found = [(op, key) for op in ops for key in tiles.kernel(op).CANDIDATES]
    known = dict.fromkeys(name(key) for _, key in found)
    if unknown := [wanted for wanted in names if wanted not in known]:
        raise ValueError(f"no class {'; '.join(unknown)} in {', '.join(ops)}; there are {'; '.join(known)}")
    return sorted((one for one in found if not names or name(one[1]) in names), key=_rank)


def _rank(one: Class) -> tuple[bool, ...]:
    """The sizes of the tables in the README come first, precision "highest" last."""
    op, key = one
    kind, width = key if isinstance(key, tuple) else (key, HEADLINE_WIDTH)
    return "split" in str(kind), width != HEADLINE_WIDTH, op != HEADLINE_OP


def run_once(op: str, key: Hashable, value: tuple) -> None:
    """Run a candidate, and with it all that Triton compiles for it, the launchers included.

    Compiling alone would have to repeat what Triton derives from the arguments of a launch for the key of its
    cache: alignment, which integers are 1 or multiples of 16, the shares that follow from the GPU.
    """
    tiles.kernel(op).tune_case(key)(value)()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the process that times shares the GPU


def measure_class(
    one: Class, errors: dict[Candidate, str | None], where: torch.device, seconds: float
) -> dict:
    """Time every candidate of a class that could run: its entry of the report, fastest first."""
    op, key = one
    module, timers, skipped = tiles.kernel(op), {}, []
    make = None
    for value in module.CANDIDATES[key]:
        error = errors.get((op, key, value))
        if error is None:
            try:
                make = make or module.tune_case(key)  # whose tensors the GPU may not hold
                run = make(value)
                run()
                modes, _ = measure.timers(run, where)
                timers[value] = modes.get(cuda.GRAPH_COLD, modes[measure.COLD])
            except Exception as failed:  # of a compiler or a launch: any type
                error = reason(failed)
        if error is not None:
            skipped.append({"tiles": value, "reason": error})
    times = measure.interleave(timers, seconds) if timers else {}
    timed = [{"tiles": value, **measure.percentiles(found)} for value, found in times.items()]
    timed.sort(key=lambda candidate: candidate["p50_ms"])
    return {"op": op, "class": key, "timed": timed, "skipped": skipped}


def batches(todo: list[Class], size: int) -> Iterator[list[list[Candidate]]]:
    """Candidates by class, of as many classes at a time as have ``size`` candidates together."""
    batch: list[list[Candidate]] = []
    for op, key in todo:
        batch.append([(op, key, value) for value in tiles.kernel(op).CANDIDATES[key]])
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def measure_all(
    todo: list[Class],
    where: torch.device,
    console: Console,
    compile_them: Compile,
    size: int,
    *,
    seconds: float = SECONDS,
    budget: float = math.inf,
) -> Iterator[dict]:
    """Entries of the report as they are measured; none is begun after ``budget`` seconds.

    Args:
        size: candidates to compile before the first of them is timed: nothing else runs meanwhile.
    """
    end = time.monotonic() + budget
    work = list(batches(todo, size))
    with Bar(console, sum(len(candidates) for batch in work for candidates in batch), "candidates") as bar:
        for batch in work:
            everything = [candidate for candidates in batch for candidate in candidates]
            errors = {}
            for candidate, error in zip(everything, compile_them(everything), strict=True):
                if time.monotonic() >= end:
                    return
                bar.now(f"{candidate[0]} {name(candidate[1])}")
                errors[candidate] = error
                bar.advance()
            for op, key, _ in (candidates[0] for candidates in batch):
                if time.monotonic() >= end:
                    return
                yield measure_class((op, key), errors, where, seconds)


def begin(out: Path | None, where: torch.device) -> dict:
    """A report without entries, or the one in ``out``.

    Raises:
        ValueError: that one was measured on something else.
    """
    empty = {"device": device.describe(torch.get_num_threads(), where), "classes": []}
    if out is None or not out.exists():
        return empty
    found = tiles.load(out)
    if tiles.measured_on(found) != tiles.measured_on(empty):
        here, there = tiles.measured_on(empty), tiles.measured_on(found)
        raise ValueError(f"{out} was measured on {there}; this is {here}: give another file")
    return found


def tune(
    todo: list[Class],
    where: torch.device,
    console: Console,
    compile_them: Compile,
    size: int = 1,
    *,
    out: Path | None = None,
    seconds: float = SECONDS,
    budget: float = math.inf,
) -> None:
    """Measure classes of shapes, show the figures, and write the fastest tiles into the kernel files."""
    found = begin(out, where)
    done = {(entry["op"], entry["class"]) for entry in found["classes"] if entry["timed"]}
    if already := [one for one in todo if one in done]:
        console.print(f"{out} has {len(already)} of {len(todo)} classes already", highlight=False)
    left = [one for one in todo if one not in done]
    for entry in measure_all(list(left), where, console, compile_them, size, seconds=seconds, budget=budget):
        one = entry["op"], entry["class"]
        left.remove(one)
        found["classes"] = [e for e in found["classes"] if (e["op"], e["class"]) != one] + [entry]
        if out:
            report.write_json(out, found)
    for op in dict.fromkeys(op for op, _ in todo):
        entries = [entry for entry in found["classes"] if (entry["op"], entry["class"]) in todo]
        show(op, [entry for entry in entries if entry["op"] == op], console)
    if left:
        console.print(f"{len(left)} of {len(todo)} classes were not measured, for want of time:")
        for op, key in left:
            console.print(f"- {op} {name(key)}", highlight=False)
    # Not before the end: processes that start later would compile other source, under another key.
    for path in tiles.apply([found]):
        console.print(f"wrote {path}")


def show(op: str, entries: list[dict], console: Console) -> None:
    """The best few of every class, where its present tiles stand, and what was skipped."""
    shown = Table(title=f"{op}, fastest first", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("class")
    shown.add_column("now")
    for i in range(SHOWN):
        shown.add_column(f"{i + 1}.", justify="right")
    for entry in entries:
        key, timed = entry["class"], entry["timed"]
        values, now = [candidate["tiles"] for candidate in timed], tiles.kernel(op).TILES.get(key)
        place = f"{values.index(now) + 1}. of {len(values)}" if now in values else ""
        best = [f"{tiles.literal(c['tiles'])} {report.duration(c['p50_ms'])}" for c in timed[:SHOWN]]
        shown.add_row(name(key), place, *best)
    console.print(shown)
    for entry in entries:
        for skipped in entry["skipped"]:
            line = f"- skipped {name(entry['class'])}: {skipped['tiles']}: {skipped['reason']}"
            console.print(line, highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Tune the named ops, or all that can be tuned."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="name of a file in kernels/; default: all")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="such as few,128; default: all"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every figure here; continues FILE")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no class after so many")
    parser.add_argument(
        "--apply", nargs="+", type=Path, metavar="FILE", help="measure nothing: write the best of these"
    )
    options = parser.parse_args(arguments)
    if options.apply and (options.ops or options.classes or options.out or options.seconds < math.inf):
        parser.error("--apply goes with nothing else")
    console = Console()
    if not console.is_terminal:
        console.width = 180
    try:
        if options.apply:
            for path in tiles.apply([tiles.load(file) for file in options.apply]):
                console.print(f"wrote {path}")
            return
        where = device.pick("cuda")
        todo = classes(options.ops or tiles.tunable(), options.classes)
        count = os.cpu_count() or 1
        with Processes(count) as processes:
            compile_them = partial(processes.errors, run_once)
            tune(
                todo, where, console, compile_them, PER_PROCESS * count,
                out=options.out, budget=options.seconds,
            )  # fmt: skip
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"python -m bench.tune: {error}") from error


if __name__ == "__main__":
    main()
