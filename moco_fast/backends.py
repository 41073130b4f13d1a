"""Which backend serves which op.

Backends in order of preference: ``native`` (C++ on the CPU, CUDA C++ for
some ops), ``triton`` (on the GPU) and ``reference`` (PyTorch, anywhere). Left alone,
an op takes the first backend that serves its tensors; ``native.ON_REQUEST`` names
ops that do not take native's on a GPU. ``MOCO_FAST_BACKEND=name`` or :func:`use_backend`
forces one, and then an op it cannot serve raises instead of falling back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from moco_fast import checks, native, reference
from moco_fast.kernels import backend as triton

BACKENDS: dict[str, ModuleType] = {"native": native, "triton": triton, "reference": reference}

_forced: ContextVar[str | None] = ContextVar("moco_fast_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op that this thread calls in the block, backward included unless compiled.

    Args:
        name: "native", "triton" or "reference".

    Raises:
        ValueError: unknown name.

    Example:
        >>> with moco_fast.use_backend("reference"):
        ...     loss = moco_fast.info_nce(q, k, queue)
    """
    checks.one_of("backend", name, tuple(BACKENDS))
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend forced by :func:`use_backend` or MOCO_FAST_BACKEND, if any."""
    name = _forced.get() or os.environ.get("MOCO_FAST_BACKEND")
    if name:
        checks.one_of("MOCO_FAST_BACKEND", name, tuple(BACKENDS))
    return name or None


def choose(op: str, tensors: Sequence[Tensor]) -> ModuleType:
    """Return the backend module that serves ``op`` on ``tensors``.

    Raises:
        RuntimeError: the forced backend cannot serve them; says why.
    """
    return choose_as(forced(), op, tensors)


def choose_as(name: str | None, op: str, tensors: Sequence[Tensor]) -> ModuleType:
    """As :func:`choose` where ``name`` was forced, or nothing (None or ""), whatever is now.

    For a backward pass, which takes the backend of its forward: it runs after the block of
    :func:`use_backend`, and on a GPU in threads of its own.
    """
    if name == "reference":
        return reference
    if name:
        backend = BACKENDS[name]
        if reason := backend.cannot_serve(op, tensors):
            raise RuntimeError(f"backend {name!r} was asked for, but cannot serve {op}: {reason}")
        return backend
    on_request = tensors[0].is_cuda and op in native.ON_REQUEST
    if not on_request and native.cannot_serve(op, tensors) is None:
        return native
    # On a CPU Triton only interprets its kernels, for tests.
    if tensors[0].is_cuda and triton.cannot_serve(op, tensors) is None:
        return triton
    return reference
