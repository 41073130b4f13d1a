"""What a figure was measured on: without it the figure means nothing."""

from __future__ import annotations

import importlib.metadata
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

# Not documents and results, which benchmarks write, one after the other.
CODE = (":/", ":(top,exclude)*.md", ":(top,exclude)bench/results")


def pick(name: str) -> torch.device:
    """The device to measure: "auto" is the GPU if there is one.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no GPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def describe(threads: int, device: torch.device) -> dict[str, Any]:
    """Name, processor, instruction set, threads, load, versions, commit and date of this run."""
    cpu = _cpu_model()
    processor = [cpu, _isa(), f"{threads} threads"] if device.type == "cpu" else _gpu(device)
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", " ".join(processor[:3]).lower()).strip("-"),
        "type": device.type,
        "processor": ", ".join(processor),
        "cpu": cpu,
        "isa": _isa(),
        "threads": threads,
        "cpus": os.cpu_count() or 1,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "moco_fast": moco_fast.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu(device: torch.device) -> list[str]:
    about = torch.cuda.get_device_properties(device)
    return [about.name, f"sm_{about.major}{about.minor}", f"CUDA {torch.version.cuda}"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The marketing name of the CPU; the architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _isa() -> str:
    return "no native kernels" if native.unavailable() else native.compiled._C.isa()


def _commit() -> str | None:
    """The commit of the checkout, "-dirty" if code differs from it; None outside a checkout."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    where, options = Path(__file__).parent, {"capture_output": True, "text": True, "check": True}
    return subprocess.run(["git", *arguments], cwd=where, **options).stdout.strip()
