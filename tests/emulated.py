"""The CUDA kernels on this CPU: csrc/*_cuda.cu compiled against tests/cuda instead of CUDA's headers."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

import moco_fast
from moco_fast import native

CSRC = Path(moco_fast.__file__).parent.parent / "csrc"
MACHINE = Path(__file__).parent / "cuda"
SOURCES = ("ema_update", "sgd", "adamw", "info_nce_sweep")
OPTIONS = ["-std=c++17", "-O2", "-g", "-fPIC", "-Wall", "-ffp-contract=off", f"-I{MACHINE}"]
ROLES = 6


class TensorRow(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p * ROLES),
        ("dtype", ctypes.c_int * ROLES),
        ("size", ctypes.c_int64),
    ]


class Scalar(ctypes.Structure):
    _fields_ = [("value", ctypes.c_double), ("address", ctypes.c_void_p), ("dtype", ctypes.c_int)]


class SgdStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("momentum", "dampening", "weight_decay", "trust")),
        *((name, ctypes.c_bool) for name in ("nesterov", "maximize", "first")),
    ]


class AdamwStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "weight_decay")),
        ("maximize", ctypes.c_bool),
    ]


class Sweep(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("queue", ctypes.c_void_p),
        ("operand", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "pos")),
        *((name, ctypes.c_void_p) for name in ("sums", "totals", "shifts", "cosines", "ranks")),
        *((name, ctypes.c_int64) for name in ("n", "slots", "features", "shares", "steps")),
        *((name, ctypes.c_float) for name in ("scale", "fixed_shift", "offset", "least")),
        ("online", ctypes.c_bool),
    ]


def compiled(folder, sources=SOURCES, csrc=CSRC, sanitizer=()):
    """Compile kernels to a library; a compiler runs for each at the same time."""
    compiler = os.environ.get("CXX", "").split() or [shutil.which("g++") or shutil.which("clang++")]
    if compiler == [None] or not csrc.exists():
        pytest.skip("no C++ compiler, or no sources: the CUDA kernels were not emulated")
    commands, objects = [], []
    for source in (*(csrc / f"{name}_cuda.cu" for name in sources), MACHINE / "kernels.cpp"):
        objects.append(folder / f"{source.stem}.o")
        defines = [f"-DMOCO_FAST_HAS_{name.upper()}" for name in sources]
        options = [*OPTIONS, *sanitizer, f"-I{csrc}", "-DMOCO_FAST_EMULATED", *defines]
        commands.append([*compiler, *options, "-x", "c++", "-c", source, "-o", objects[-1]])
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands]
    told = [process.communicate()[0].decode() for process in running]
    assert not any(process.returncode for process in running), "\n".join(told)
    library = folder / "kernels.so"
    subprocess.run([*compiler, *sanitizer, "-shared", *objects, "-o", library], check=True)
    return library


@cache
def library():
    """All kernels, compiled once per process."""
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(compiled(Path(folder)))


def call(name, *arguments, kernels=None, seed=0):
    """Run a kernel's host function.

    Args:
        seed: of the order in which the emulated threads run.

    Raises:
        RuntimeError: what the emulator or the host function found wrong.
    """
    kernels = kernels or library()
    kernels.seed(seed)
    function = getattr(kernels, name)
    function.restype = ctypes.c_char_p
    if told := function(*arguments).decode():
        raise RuntimeError(told)


class MultiTensor:
    """In place of the compiled module ``_C``: its functions over lists of tensors, emulated."""

    def __init__(self, others):
        self._others = others

    def __getattr__(self, name):
        return getattr(self._others, name)

    @staticmethod
    def Rows(addresses, sizes, dtypes, *_device):
        table = (TensorRow * len(sizes))()
        for i, (row, size) in enumerate(zip(table, sizes, strict=True)):
            row.size = size
            for role, (address, dtype) in enumerate(zip(addresses, dtypes, strict=True)):
                row.data[role], row.dtype[role] = address[i] or None, dtype[i]
        return table

    @staticmethod
    def ema_update(rows, m, _threads, _stream):
        call("ema_update", rows, len(rows), ctypes.byref(Scalar(*m)))

    @staticmethod
    def sgd_scratch(_rows):
        return 0  # kernels.cpp has its own

    @staticmethod
    def sgd_step(rows, step, lr, m, _scratch, _threads, _stream):
        call(
            "sgd_step", rows, len(rows), *(ctypes.byref(x) for x in (SgdStep(*step), Scalar(*lr), Scalar(*m)))
        )

    @staticmethod
    def adamw_step(rows, step, lr, m, _threads, _stream):
        numbers = AdamwStep(*step), Scalar(*lr), Scalar(*m)
        call("adamw_step", rows, len(rows), *(ctypes.byref(x) for x in numbers))


def sweep_arguments(q, k, queue, pairs, found, steps, numbers, online):
    """Those of ``native.info_nce_sweep`` as the kernel takes them."""
    about, written = ([tensor.data_ptr() for tensor in group] for group in (pairs, found))
    return Sweep(
        q.data_ptr(), k.data_ptr(), native.DTYPES[q.dtype], queue.data_ptr(), native.DTYPES[queue.dtype],
        *about, *[*written, None, None][:5], len(q), *queue.shape, len(found[0]), steps, *numbers, online,
    )  # fmt: skip


def info_nce_sweep(*args, **options):
    """In place of ``native.info_nce_sweep``."""
    call("info_nce_sweep", ctypes.byref(sweep_arguments(*args)), **options)
