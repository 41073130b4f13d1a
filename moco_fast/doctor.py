"""What ``moco-fast doctor`` reports: versions, what was built and why, what serves which op."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import torch

from moco_fast import backends, native
from moco_fast._version import __version__
from moco_fast.kernels import backend as triton

# All that a backend has a kernel for; the reference has every one of them.
OPS = tuple(dict.fromkeys((*triton.OPS, *native.OPS)))
PACKAGES = (
    *("numpy", "triton", "torchvision", "timm", "safetensors", "pillow", "rich", "tyro", "tensorboard"),
    *("matplotlib", "scikit-learn"),
)


def report() -> Iterator[tuple[str, str]]:
    """Rows of (what, state)."""
    yield "moco_fast", __version__
    yield "Python", f"{sys.version.split()[0]} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    for name in PACKAGES:
        yield name, _version(name)
    yield from _native()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            yield f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    else:
        yield "GPU", "none that torch can use"
    forced = backends.forced()
    yield "backend", f"forced: {forced}" if forced else "chosen per op"
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op in OPS:
        for device in devices:
            yield f"{op} on {device}", _served_by(op, torch.empty((1, 128), device=device))


def _served_by(op: str, probe: torch.Tensor) -> str:
    """The backend that an op takes, and why not one preferred to it; or why it raises."""
    try:
        chosen = backends.choose(op, (probe,))
    except RuntimeError as error:  # one is forced, and cannot
        return f"none: {error}"
    passed_over: list[str] = []
    for name, backend in backends.BACKENDS.items():
        if backend is chosen:
            return "; ".join([name, *passed_over])
        passed_over.append(f"not {name}: {backend.cannot_serve(op, (probe,)) or 'only when asked for'}")
    raise AssertionError("choose() returns one of BACKENDS")


def _native() -> Iterator[tuple[str, str]]:
    info = native.build_info()
    if reason := native.unavailable():
        yield "native kernels", f"not built: {reason}"
        return
    compiled = native.compiled._C
    yield "native kernels", f"built with {info.get('compiler', 'an unknown compiler')}"
    yield "CPU instructions", f"{compiled.isa()} in use; this CPU runs {', '.join(compiled.isas())}"
    medium = "yes: info_nce's precision='medium' uses them"
    yield "bf16 matrix units", medium if native.has_bf16_units() else "no: precision='medium' runs in fp32"
    yield "native CUDA", "built" if compiled.has_cuda else f"not built: {info.get('why') or 'no nvcc'}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
