"""``python -m bench``: measure every op, print the tables, write the JSON and the picture."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import device, measure, report, sweep
from bench.case import WrongResult
from bench.collect import check, collect
from bench.findings import Findings
from bench.ops import OPS
from bench.plot import plot


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to measure")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help="only these")
    parser.add_argument("--own", action="store_true", help="only our ways and the official formula")
    parser.add_argument("--add", action="store_true", help="keep what the results hold of other ops")
    parser.add_argument("--seconds", type=float, help="of timing per case")
    parser.add_argument("--check", action="store_true", help="check all results, time nothing")
    parser.add_argument("--sweep", action="store_true", help="info_nce over N, K, C and T instead")
    report.add_options(parser)
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="where to replace the table between the markers"
    )
    options = parser.parse_args(arguments)
    if options.readme and (options.sweep or options.own or len(options.ops) < len(OPS)):
        parser.error("--readme takes the table of a whole run")
    return options


def measure_ops(
    options: argparse.Namespace, where: torch.device, console: Console, progress: Progress
) -> tuple[dict, list[dict]]:
    """Measure, print and draw; returns the report, and what failed in this run."""
    findings = Findings(device.describe(torch.get_num_threads(), where), options.quick)
    base = report.folder(options) / findings.about["name"]
    path = base.with_suffix(".json")
    if options.add and path.exists():
        findings.add(json.loads(path.read_text(encoding="utf-8")), but=options.ops)
    earlier = len(findings.failed)
    with progress:
        save = partial(report.write_json, path)
        figures = collect(findings, where, progress, options.ops, options.own, options.seconds, save)
    console.print(report.headline(figures), highlight=False)
    for table in report.tables(figures):
        console.print(table)
    plot(base.with_suffix(".png"), figures)
    return figures, figures["failed"][earlier:]


def measure_sweep(
    options: argparse.Namespace, where: torch.device, console: Console, progress: Progress
) -> tuple[dict, list[dict]]:
    """Measure and draw the sweep, in which a peer that fails at a point is a finding."""
    with progress:
        figures = sweep.collect(options.quick, where, progress)
    base = report.folder(options) / f"{figures['device']['name']}-sweep"
    report.write_json(base.with_suffix(".json"), figures)
    sweep.plot(base.with_suffix(".png"), figures)
    return figures, []


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks. Ends with a message where nothing can be measured, or something of ours failed."""
    options = options_of(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 210  # of a log, where nothing limits a table
    progress = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
    try:
        where = device.pick(options.device)
        measure.use_threads()
        if options.readme:  # before minutes of measuring, not after
            report.check_section(options.readme)
        if options.check:
            with progress:
                failed = check(options.quick, where, progress, options.ops, options.own)
        else:
            run = measure_sweep if options.sweep else measure_ops
            figures, failed = run(options, where, console, progress)
            for note in figures["notes"]:
                console.print(f"- {note}", highlight=False, markup=False)
            console.print(f"wrote the figures of {figures['device']['name']} to {report.folder(options)}")
            if options.readme:
                report.write_section(options.readme, report.markdown(figures))
                console.print(f"updated {options.readme}")
    except (OSError, ValueError, WrongResult) as error:
        raise SystemExit(f"python -m bench: {error}") from error
    if failed:
        lines = [f"{one['op']}, {one['label']}: {one['why']}" for one in failed]
        raise SystemExit("\n".join(["python -m bench: failed:", *lines]))


if __name__ == "__main__":
    main()
