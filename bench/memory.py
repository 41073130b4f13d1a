"""How much memory a call needs beyond what was there before it: growth of the peak resident size.

Tracing allocators sees only part of it (torch, OpenMP kernels and BLAS all
allocate on their own), so the kernel's own account is read. In a fresh process:
call once, give freed pages back (``malloc_trim``), reset the peak
(``/proc/self/clear_refs``), note the resident size, call again, and subtract it
from the new peak (``VmHWM``). Buffers that a library keeps from one call to the
next are not counted; pages are, so figures below 1 MB are noise.

All of this is for the CPU; on a GPU torch's allocator counts (``bench/cuda.py::peak_extra``).
``python -m bench.memory [--quick] [--own] OP...`` prints a line of JSON per op.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra(run: Callable[[], object]) -> int:
    """Bytes by which a warm call of ``run`` raises the resident size of this process at its peak."""
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def by_op(quick: bool, own: bool, ops: Sequence[str]) -> Iterator[tuple[str, dict[str, dict[str, int]]]]:
    """Yield each op and the peak extra bytes of its peers, by label of the case; the process is a fresh one.

    Yields nothing where the kernel or the C library offers no way to measure it.

    Raises:
        RuntimeError: the process failed; what it printed is on the standard error.
    """
    if not CLEAR_REFS.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return
    flags = [*(["--quick"] if quick else []), *(["--own"] if own else [])]
    command = [sys.executable, "-m", "bench.memory", *flags, *ops]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            op, figures = json.loads(line)
            yield op, figures
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")


def main() -> None:
    from bench import measure
    from bench.ops import cases

    measure.use_threads()
    quick, own = "--quick" in sys.argv[1:], "--own" in sys.argv[1:]
    for op in (word for word in sys.argv[1:] if not word.startswith("--")):
        figures: dict[str, dict[str, int]] = {}
        for case in cases(op, quick, torch.device("cpu"), own):
            figures[case.label] = {}
            for name, peer in case.peers.items():
                with suppress(Exception):  # why it fails is told where it is checked
                    figures[case.label][name] = peak_extra(peer.run)
        print(json.dumps([op, figures]), flush=True)


if __name__ == "__main__":
    main()
