"""``python -m bench``: measure every op, print the tables, write the JSON and the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import device, report, sweep
from bench.case import WrongResult
from bench.collect import collect
from bench.plot import plot


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks; a wrong result or a README without markers ends them with a message."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to measure")
    parser.add_argument("--sweep", action="store_true", help="info_nce over N, K, C and T instead")
    report.add_options(parser)
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="where to replace the table between the markers"
    )
    options = parser.parse_args(arguments)
    if options.sweep and options.readme:
        parser.error("--readme takes the table of a run without --sweep")
    console = Console()
    if not console.is_terminal:
        console.width = 210  # of a log, where nothing limits a table
    try:
        where = device.pick(options.device)
        if options.readme:  # before minutes of measuring, not after
            report.check_section(options.readme)
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            measured = sweep.collect if options.sweep else collect
            figures = measured(options.quick, where, progress)
    except (OSError, ValueError, WrongResult) as error:
        raise SystemExit(f"python -m bench: {error}") from error

    out = report.folder(options)
    if options.sweep:
        base = out / f"{figures['device']['name']}-sweep"
        sweep.plot(base.with_suffix(".png"), figures)
    else:
        console.print(report.headline(figures), highlight=False)
        for table in report.tables(figures):
            console.print(table)
        base = out / figures["device"]["name"]
        plot(base.with_suffix(".png"), figures)
    for note in figures["notes"]:
        console.print(f"- {note}", highlight=False)
    report.write_json(base.with_suffix(".json"), figures)
    console.print(f"wrote {base}.json and {base}.png")
    if options.readme:
        report.write_section(options.readme, report.markdown(figures))
        console.print(f"updated {options.readme}")


if __name__ == "__main__":
    main()
