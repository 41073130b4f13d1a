"""Getting datasets onto this computer, with a limit on how long that may take."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from moco_fast.extras import INSTALL

CONNECT_SECONDS = 12  # silence after which a server counts as unreachable


def cache_dir() -> Path:
    """Where downloads go."""
    return Path.home() / ".cache" / "moco_fast"


def roots() -> list[Path]:
    """Directories that may hold datasets, best first: MOCO_FAST_DATA, the cache, ``data`` in this one."""
    own = os.environ.get("MOCO_FAST_DATA")
    return [*([Path(own).expanduser()] if own else []), cache_dir(), Path("data")]


def with_torchvision(name: str, root: Path, seconds: float) -> str | None:
    """Let ``torchvision.datasets.NAME`` download to a directory; the reason where that fails."""
    if importlib.util.find_spec("torchvision") is None:
        return f"torchvision is not installed ({INSTALL})"
    # A child process: the time limit holds whatever hangs, and no socket default changes here.
    code = (
        f"import socket, sys; from torchvision.datasets import {name}\n"
        f"socket.setdefaulttimeout({CONNECT_SECONDS}); {name}(sys.argv[1], download=True)"
    )
    return run([sys.executable, "-c", code, str(root)], seconds)


def run(command: list[str], seconds: float) -> str | None:
    """Run a command; None on success, else its last line of complaint."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:g} s"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    return lines[-1]
