"""What a figure was measured on: without it the figure means nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import moco_fast
from moco_fast import native


def describe(threads: int) -> dict[str, Any]:
    """Name, CPU, instruction set, threads, load, versions, commit and date of this run."""
    cpu, isa = _cpu_model(), _isa()
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{cpu} {isa} {threads} threads".lower()).strip("-"),
        "cpu": cpu,
        "isa": isa,
        "threads": threads,
        "cpus": os.cpu_count() or 1,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moco_fast": moco_fast.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    """The marketing name of the CPU; the architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _isa() -> str:
    return "no native kernels" if native._C is None else native._C.isa()


def _commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
