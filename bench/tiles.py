"""What ``bench/tune.py`` found: its report, and the literals ``TILES`` of the kernel files written from it.

A report is JSON: what was measured on, and per class of shapes every candidate, with its time or the reason
that it has none.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import textwrap
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType

WIDTH = 110  # of a line, as ruff formats


def tunable() -> list[str]:
    """Ops whose kernel file has what tuning needs."""
    import moco_fast.kernels

    names = [module.name for module in pkgutil.iter_modules(moco_fast.kernels.__path__)]
    return [name for name in names if not missing(_import(name))]


def missing(module: ModuleType) -> list[str]:
    """Which parts of the contract a kernel file lacks."""
    return [name for name in ("TILES", "CANDIDATES", "tune_case") if not hasattr(module, name)]


def kernel(op: str) -> ModuleType:
    """The kernel file of an op.

    Raises:
        ValueError: it cannot be tuned; says why.
    """
    module = _import(op)
    if lacking := missing(module):
        raise ValueError(f"moco_fast.kernels.{op} cannot be tuned: it has no {', '.join(lacking)}")
    path = Path(module.__file__)
    _assignment(path.read_text(encoding="utf-8"), path)
    return module


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"moco_fast.kernels.{name}")


def measured_on(report: dict) -> str:
    """Device and versions, which figures that are compared must share."""
    about = report["device"]
    return f"{about['processor']}, torch {about['torch']}, triton {about['triton']}"


def load(path: Path) -> dict:
    """Read a report.

    Raises:
        ValueError: it is none, or names an op, a class or tiles that the kernel files do not know.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not (measured_on(report) and report["device"]["date"]):
            raise ValueError("it does not say what was measured on, and when")
        for entry in report["classes"]:
            entry["class"] = _tupled(entry["class"])
            for candidate in (*entry["timed"], *entry["skipped"]):
                candidate["tiles"] = _tupled(candidate["tiles"])
            _check(entry)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of bench.tune: {type(error).__name__}: {error}") from error
    except ValueError as error:  # of JSON, too
        raise ValueError(f"{path}: {error}") from error
    return report


def _tupled(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _check(entry: dict) -> None:
    op, key = entry["op"], entry["class"]
    if op not in tunable():
        raise ValueError(f"no kernel file {op!r} that can be tuned; there are {', '.join(tunable())}")
    candidates = kernel(op).CANDIDATES
    if key not in candidates:
        raise ValueError(f"{op} has no class {literal(key)}; it has {', '.join(map(literal, candidates))}")
    for timed in entry["timed"]:
        if timed["tiles"] not in candidates[key]:
            raise ValueError(f"{literal(timed['tiles'])} is not a candidate of {op} {literal(key)}")
        if not timed["p50_ms"] > 0:
            raise ValueError(f"{op} {literal(key)} {literal(timed['tiles'])} took {timed['p50_ms']} ms")


def apply(reports: list[dict]) -> list[Path]:
    """Write the fastest tiles of each class into the kernel files; of a class in several, the last report's.

    Raises:
        ValueError: the reports were not measured on one device with one version of everything.
    """
    if len({measured_on(report) for report in reports}) > 1:
        raise ValueError(f"not measured alike: {'; '.join(dict.fromkeys(map(measured_on, reports)))}")
    best: dict[str, dict] = {}
    for report in reports:
        for entry in report["classes"]:
            if entry["timed"]:
                fastest = min(entry["timed"], key=lambda timed: timed["p50_ms"])
                best.setdefault(entry["op"], {})[entry["class"]] = fastest["tiles"]
    date = max(report["device"]["date"] for report in reports)
    paths = {op: Path(kernel(op).__file__) for op in best}  # all that can fail, before any is written
    for op, path in paths.items():
        rewrite(path, best[op], f"{measured_on(reports[-1])}, {date[:10]}")
    return list(paths.values())


def rewrite(path: Path, best: dict[Hashable, tuple], measured: str) -> None:
    """Replace the tiles of the classes in ``best`` in the literal TILES of a file; say above it where from.

    Raises:
        ValueError: the file has no module-level literal ``TILES = {...}``.
    """
    text = path.read_text(encoding="utf-8")
    node = _assignment(text, path)
    tiles = ast.literal_eval(node.value) | best
    lines = text.splitlines()
    part = "" if len(best) == len(tiles) else f" for {len(best)} of {len(tiles)} classes"
    note = textwrap.wrap(f"Measured with bench/tune.py{part}: {measured}.", WIDTH - 2)
    above = [*_without_measurement(lines[: node.lineno - 1]), *(f"# {line}" for line in note)]
    target = ast.get_source_segment(text, node).partition("{")[0]  # "TILES = ", or with an annotation
    new = [*above, *_layout(target, tiles), *lines[node.end_lineno :]]
    path.write_text("\n".join(new) + "\n", encoding="utf-8")


def _without_measurement(lines: list[str]) -> list[str]:
    """The comment at the end of these lines keeps its meaning, up to what it says of a measurement."""
    start = len(lines)
    while start and lines[start - 1].startswith("#"):
        start -= 1
    for i in range(start, len(lines)):
        if said := re.search(r"[;.]?\s*\b(not )?measured\b", lines[i], re.IGNORECASE):
            kept = lines[i][: said.start()]
            return [*lines[:i], *([f"{kept}."] if kept != "#" else [])]
    return lines


def _assignment(text: str, path: Path) -> ast.Assign | ast.AnnAssign:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == "TILES" for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return node
    raise ValueError(f"{path} has no module-level literal TILES = {{...}}")


def _layout(target: str, tiles: dict) -> list[str]:
    """The literal as ruff formats it: on one line if it fits, else an entry per line."""
    entries = [f"{literal(key)}: {literal(value)}" for key, value in tiles.items()]
    line = f"{target}{{{', '.join(entries)}}}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{target}{{", *(f"    {entry}," for entry in entries), "}"]


def literal(value: object) -> str:
    """``repr`` with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value) if isinstance(value, str) else repr(value)
