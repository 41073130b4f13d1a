"""Tables and figures of studies, into a document.

    for name in methods dictionary momentum temperature shuffle batch-size; do moco-fast study $name; done
    python -m bench.studies --doc docs/studies.md

Tests: tests/test_study.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import tyro

from bench import device, report
from moco_fast.study.plans import STUDIES
from moco_fast.study.results import read_rows


def section(folder: Path, name: str, scale: str, images: Path) -> str:
    """Question, table and figure of one study; copies the figure to ``images``."""
    rows = read_rows(folder)
    study = STUDIES[name]
    picture = images / f"study-{name}.png"
    shutil.copyfile(folder / "figure.png", picture)
    seconds = sorted(row.seconds for row in rows)
    runs = f"{len(rows)} runs, {seconds[len(seconds) // 2]:.0f} s each (median, with the evaluation)"
    seeds = len({row.seed for row in rows})
    command = f"moco-fast study {name}" + (f" --seeds {seeds}" if seeds > 1 else "")
    table = (folder / "table.md").read_text(encoding="utf-8")
    return (
        f"## {study.question}\n\n`{command}`, {scale} scale, after {study.source}. {runs}.\n\n"
        f"{table}\n![{study.question}](images/{picture.name})\n"
    )


def write(
    folder: Path = Path("studies"), scale: str = "small", doc: Path = Path("docs/studies.md"), note: str = ""
) -> None:
    """Copy what studies have found into a document, between its markers.

    Args:
        folder: holds NAME-SCALE for every study that has run.
        scale: which of them.
        doc: gets the tables; images/ beside it the figures.
        note: said beside the machine.
    """
    done = [name for name in STUDIES if (folder / f"{name}-{scale}" / "figure.png").exists()]
    if not done:
        raise SystemExit(f"no study of scale {scale} has ended in {folder}: run moco-fast study NAME")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = device.describe(torch.get_num_threads(), where)
    text = f"{about['processor']}; torch {about['torch']}; {about['date'][:10]}. {note}".strip()
    parts = [section(folder / f"{name}-{scale}", name, scale, doc.parent / "images") for name in done]
    report.write_section(doc, "\n".join(["", text, "", *parts]), "studies")
    print(f"{len(done)} studies in {doc}")


if __name__ == "__main__":
    tyro.cli(write)
