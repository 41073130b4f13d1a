"""The figures as tables in the terminal, as JSON and as the table in the README."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from bench.case import OFFICIAL, OURS
from moco_fast import files

RESULTS = Path(__file__).parent / "results"
SMOKE = Path(__file__).parents[1] / "build" / "bench"


def add_options(parser: ArgumentParser) -> None:
    """``--quick`` and ``--out``, where :func:`folder` puts results."""
    parser.add_argument("--quick", action="store_true", help="smoke run with tiny sizes")
    help = "where the results go; default: bench/results, of a smoke run build/bench"
    parser.add_argument("--out", type=Path, metavar="DIR", help=help)


def folder(options: Namespace) -> Path:
    """Where results go; made if it is not there. A smoke run leaves the measured ones alone."""
    out = options.out or (SMOKE if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    return out


def headline(report: dict) -> str:
    """Where, with what and when, in one line."""
    device, roof = report["device"], report["roofline"]
    rates = ", ".join(
        f"{rate:.0f} TFLOP/s {name}" if rate >= 10 else f"{rate * 1e3:.0f} GFLOP/s {name}"
        for name, rate in roof["tflop_per_s"].items()
    )
    rates = f"copy {roof['copy_gb_per_s']:.1f} GB/s, torch.mm {rates}"
    return f"{device['processor']}; {rates}; {versions(device)}"


def versions(device: dict) -> str:
    """With what and when, in one line."""
    commit = f" ({device['commit']})" if device["commit"] else ""
    return (
        f"moco_fast {device['moco_fast']}{commit}, torch {device['torch']}, Python {device['python']}; "
        f"{device['date'][:10]}"
    )


def _columns(case: dict) -> list[str]:
    return [
        "",
        "p20 / p50 / p80",
        *_other_modes(case),
        "of fastest",
        "vs official",
        "extra MB",
        "GB/s",
        "TFLOP/s",
        "roofline",
        *(f"{what} error{f' ({kinds})' if kinds else ''}" for what, kinds, _ in _errors(case["peers"][0])),
    ]


def _other_modes(case: dict) -> list[str]:
    """Ways of timing beside the first, which every peer has."""
    return list(dict.fromkeys(mode for peer in case["peers"] for mode in list(peer["modes"])[1:]))


def _errors(peer: dict) -> list[tuple[str, str, str]]:
    """Errors that differ only in the kind of input, "what, kind", side by side: (what, kinds, figures)."""
    groups: dict[str, dict[str, float]] = {}
    for key, error in peer["errors"].items():
        what, _, kind = key.partition(", ")
        groups.setdefault(what, {})[kind] = error
    return [
        (what, " / ".join(kinds).strip(), " / ".join(f"{error:.0e}" for error in kinds.values()))
        for what, kinds in groups.items()
    ]


def _rows(case: dict) -> Iterator[tuple[dict, list[str]]]:
    for peer in case["peers"]:
        extra, modes = peer["extra_memory_mb"], peer["modes"]
        yield (
            peer,
            [
                peer["name"],
                duration(*(peer[f"{p}_ms"] for p in ("p20", "p50", "p80"))),
                *(duration(modes[m]["p50_ms"]) if m in modes else "" for m in _other_modes(case)),
                f"{peer['times_fastest']:.2f}x",
                f"{peer['speedup_over_official']:.2f}x",
                "" if extra is None else "< 1" if extra < 1 else f"{extra:.0f}",
                digits(peer["gb_per_s"]),
                f"{peer['tflop_per_s']:.2f}",
                f"{peer['roofline_share']:.0%}",
                *(figures for _, _, figures in _errors(peer)),
            ],
        )


def duration(*ms: float) -> str:
    """Milliseconds with their unit, which is us where the last of them is below one."""
    scale, unit = (1e3, "us") if ms[-1] < 1 else (1, "ms")
    return f"{' / '.join(digits(value * scale) for value in ms)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def tables(report: dict) -> Iterator[Table]:
    """One table per op and size, fastest first, ours in bold."""
    for case in report["cases"]:
        table = Table(
            title=f"{case['op']}  {case['label']}  ({case['rounds']} rounds)",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for i, column in enumerate(_columns(case)):
            table.add_column(column, justify="right" if i else "left", no_wrap=i < 2)
        for peer, cells in _rows(case):
            table.add_row(*cells, style="bold green" if peer["ours"] else None)
        yield table


def markdown(report: dict) -> str:
    """What belongs between the markers of the README: a line per case, and folded away all that was found."""
    lines = [headline(report) + ".", "", *_summary(report), ""]
    lines += ["<details>", "<summary>All ways: times, memory, share of the roofline, errors</summary>", ""]
    for case in report["cases"]:
        columns = _columns(case)
        lines += [f"**`{case['op']}`**, {case['label']}:", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "|".join([":--", *["--:"] * (len(columns) - 1)]) + "|")
        for peer, cells in _rows(case):
            if peer["ours"]:
                cells[0] = f"**{cells[0]}**"
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [*(f"- {note}" for note in report["notes"]), "", "</details>"]
    return "\n".join(lines)


def _summary(report: dict) -> Iterator[str]:
    """Our fastest way of every case beside the official one and the fastest of the others.

    What rounds to bf16, which has to be asked for, has a line of its own; only there others may do so.
    """
    yield "| median time | moco_fast | official formula | vs official | fastest other way | vs it |"
    yield "|:--|--:|--:|--:|:--|--:|"
    for case in report["cases"]:
        (official,) = (peer for peer in case["peers"] if peer["name"] == OFFICIAL)
        for label, bf16 in ((case["label"], False), (f"{case['label']}, bf16", True)):
            ours = [p for p in case["peers"] if p["ours"] and (p["product"] == "bf16") == bf16]
            others = [p for p in case["peers"] if not p["ours"] and (bf16 or p["product"] != "bf16")]
            if not ours:
                continue
            fastest, other = ours[0], others[0]  # of peers in order of their times
            cells = [
                f"`{case['op']}`, {label}",
                f"{duration(fastest['p50_ms'])}, {fastest['name'].removeprefix(OURS).strip()}",
                duration(official["p50_ms"]),
                f"{fastest['speedup_over_official']:.2f}x",
                f"{other['name']}, {duration(other['p50_ms'])}",
                f"{other['p50_ms'] / fastest['p50_ms']:.2f}x",
            ]
            yield "| " + " | ".join(cells) + " |"


def check_section(path: Path, name: str = "bench") -> tuple[str, str]:
    """Return what stands before and after a section of a document, its markers included.

    Raises:
        ValueError: the markers are not there once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"readme must hold {begin} and, after it, {end}, once each; {path} does not")
    return text[: text.index(begin)] + begin, text[text.index(end) :]


def write_section(path: Path, content: str, name: str = "bench") -> None:
    """Replace what stands between the markers of a document.

    Raises:
        ValueError: the markers are not there once each and in order.
    """
    before, after = check_section(path, name)
    path.write_text(f"{before}\n{content}\n{after}", encoding="utf-8")


def markdown_table(table: Table) -> str:
    """A table for a document."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    lines = [[str(column.header) for column in table.columns], *map(list, zip(*columns, strict=True))]
    rules = ["--:" if column.justify == "right" else ":--" for column in table.columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rules, *lines[1:]])


def write_json(path: Path, report: dict) -> None:
    """Write every figure, whole or not at all: a run that is killed leaves what it wrote before."""
    files.write_text(path, json.dumps(report, indent=2) + "\n")
