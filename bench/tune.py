"""Measure the tile tables of the Triton kernels on this GPU: ``python -m bench.tune [OP ...]``.

A kernel file ``kernels/<op>.py`` that can be tuned has, in its module,

* ``TILES = {...}``: a literal dict, from a class of shapes to a tuple of tile sizes;
* ``CANDIDATES: dict[key, list[value]]``: what to try for a class;
* ``tune_case(key) -> Callable[[value], Callable[[], None]]``: makes the launch of a candidate.

Candidates of a class take turns, from a cold L2 and without launch overhead
where a CUDA graph takes it out. One that does not compile or run is skipped and
listed. The fastest go into the literal, in place, under a comment that says on
what they were measured; classes without candidates keep their tiles. The
results are not checked here: run the tests afterwards.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import pkgutil
import re
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import cuda, device, measure, report

SECONDS = 1.0  # of timing per class of shapes
SHOWN = 5
WIDTH = 110  # of a line, as ruff formats

Value = tuple
Timed = dict[Hashable, list[tuple[float, Value]]]  # by class: median ms and tiles, fastest first


def tunable() -> list[str]:
    """Ops whose kernel file has what tuning needs."""
    import moco_fast.kernels

    names = [module.name for module in pkgutil.iter_modules(moco_fast.kernels.__path__)]
    return [name for name in names if not missing(_kernel(name))]


def missing(module: ModuleType) -> list[str]:
    """Which parts of the contract a kernel file lacks."""
    return [name for name in ("TILES", "CANDIDATES", "tune_case") if not hasattr(module, name)]


def _kernel(name: str) -> ModuleType:
    return importlib.import_module(f"moco_fast.kernels.{name}")


def time_candidates(module: ModuleType, where: torch.device, seconds: float) -> tuple[Timed, list[str]]:
    """Time every candidate of every class; also what was skipped, and why."""
    found: Timed = {}
    skipped = []
    for key, candidates in module.CANDIDATES.items():
        make = module.tune_case(key)
        timers = {}
        for value in candidates:
            try:
                run = make(value)
                run()
                modes, _ = measure.timers(run, where)
            except Exception as error:  # of a compiler or a launch: any type
                reason = (str(error).strip() or "no reason given").split("\n")[0][:160]
                skipped.append(f"{key}: {value}: {type(error).__name__}: {reason}")
                continue
            timers[value] = modes.get(cuda.GRAPH_COLD, modes[measure.COLD])
        if timers:
            times = measure.interleave(timers, seconds)
            medians = [(measure.percentiles(values)["p50_ms"], value) for value, values in times.items()]
            found[key] = sorted(medians, key=lambda pair: pair[0])
    return found, skipped


def table(op: str, found: Timed, before: dict) -> Table:
    """The best few of every class, and where its present tiles stand."""
    shown = Table(title=f"{op}, fastest first", title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("class")
    shown.add_column("now")
    for i in range(SHOWN):
        shown.add_column(f"{i + 1}.", justify="right")
    for key, ranked in found.items():
        values, now = [value for _, value in ranked], before.get(key)
        place = f"{values.index(now) + 1}. of {len(values)}" if now in values else ""
        best = [f"{_literal(value)} {report.duration(ms)}" for ms, value in ranked[:SHOWN]]
        shown.add_row(_literal(key), place, *best)
    return shown


def rewrite(path: Path, best: dict, measured: str) -> None:
    """Replace the tiles of the classes in ``best`` in the literal TILES of a file; say above it where from.

    Raises:
        ValueError: the file has no module-level literal ``TILES = {...}``.
    """
    text = path.read_text(encoding="utf-8")
    node = _assignment(text, path)
    tiles = ast.literal_eval(node.value) | best
    lines = text.splitlines()
    above = lines[: node.lineno - 1]
    if above and above[-1].startswith("#") and re.search(r"\bmeasured\b", above[-1], re.IGNORECASE):
        # Its meaning stays, what it says of a measurement does not.
        kept = re.split(r"[;.]?\s*(?:not )?measured\b", above.pop()[1:], maxsplit=1, flags=re.IGNORECASE)[0]
        if kept.strip():
            above.append(f"# {kept.strip()}.")
    above.append(f"# Measured with bench/tune.py: {measured}.")
    target = ast.get_source_segment(text, node).partition("{")[0]  # "TILES = ", or with an annotation
    new = [*above, *_layout(target, tiles), *lines[node.end_lineno :]]
    path.write_text("\n".join(new) + "\n", encoding="utf-8")


def _assignment(text: str, path: Path) -> ast.Assign | ast.AnnAssign:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == "TILES" for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return node
    raise ValueError(f"{path} has no module-level literal TILES = {{...}}")


def _layout(target: str, tiles: dict) -> list[str]:
    """The literal as ruff formats it: on one line if it fits, else an entry per line."""
    entries = [f"{_literal(key)}: {_literal(value)}" for key, value in tiles.items()]
    line = f"{target}{{{', '.join(entries)}}}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{target}{{", *(f"    {entry}," for entry in entries), "}"]


def _literal(value: object) -> str:
    """``repr`` with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def tune(op: str, where: torch.device, console: Console, seconds: float = SECONDS) -> None:
    """Tune one op and rewrite its file.

    Raises:
        ValueError: its kernel file cannot be tuned; says why.
    """
    module = _kernel(op)
    if lacking := missing(module):
        raise ValueError(f"moco_fast.kernels.{op} cannot be tuned: it has no {', '.join(lacking)}")
    path = Path(module.__file__)
    _assignment(path.read_text(encoding="utf-8"), path)  # before measuring, not after
    found, skipped = time_candidates(module, where, seconds)
    console.print(table(op, found, module.TILES))
    for line in skipped:
        console.print(f"- skipped {line}", highlight=False, markup=False)
    if found:
        about = device.describe(torch.get_num_threads(), where)
        versions = f"torch {about['torch']}, triton {about['triton']}"
        measured = f"{about['processor']}, {versions}, {about['date'][:10]}"
        rewrite(path, {key: ranked[0][1] for key, ranked in found.items()}, measured)
        console.print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    """Tune the named ops, or all that can be tuned."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="name of a file in kernels/; default: all")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 180
    try:
        where = device.pick("cuda")
        for op in options.ops or tunable():
            tune(op, where, console)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"python -m bench.tune: {error}") from error


if __name__ == "__main__":
    main()
