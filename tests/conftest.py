"""Shared by all tests: the backends of this machine, and a last line that says what could not be tested."""

import os
import signal
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

# Before Triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import emulated

from moco_fast import backends, native
from moco_fast.kernels import backend as triton
from moco_fast.native import compiled, multi_tensor

sys.path.append(str(Path(__file__).parent.parent))  # bench/ belongs to the checkout and is not installed

# Sums in one order and fp32 products, so that trajectories can be compared.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

# A shell has it ignored in what it starts in the background; tests send it to runs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# (backend, device). Those on a GPU are skipped, and counted, where there is none.
PLACES = [("reference", "cpu"), ("native", "cpu"), *((name, "cuda") for name in backends.BACKENDS)]
if triton.interpreted():
    PLACES.append(("triton", "cpu"))
PLACES.append(("native", "emulated"))  # its CUDA kernels, on the CPU


def pytest_generate_tests(metafunc):
    """Run a test that uses ``place`` wherever a backend has the op that its file names in ``OP``."""
    if "place" in metafunc.fixturenames:
        op = metafunc.module.OP
        params = [
            pytest.param(place, id="-".join(place), marks=[pytest.mark.gpu] if place[1] == "cuda" else [])
            for place in PLACES
            if has_op(*place, op)
        ]
        metafunc.parametrize("place", params, indirect=True)


def has_op(name, device, op):
    """Whether a backend has a kernel of the op for the device, built and installed here or not."""
    if name == "triton":
        return op in triton.OPS
    return name == "reference" or op in (native.OPS if device == "cpu" else native.MULTI_TENSOR)


@pytest.fixture
def place(request, monkeypatch):
    """A backend and the device it runs on; skips, by name, what is not built or installed."""
    name, device = request.param
    if device == "emulated":
        if reason := native.unavailable():
            pytest.skip(f"native backend, emulated: {reason}")
        emulated.library()  # or skips
        monkeypatch.setattr(compiled, "_C", emulated.MultiTensor(compiled._C))
        monkeypatch.setattr(multi_tensor, "_READS_TENSORS", False)
        return name, "cpu"
    module = backends.BACKENDS[name]
    probe = torch.empty((1, 1), device=device)
    if module is not backends.reference and (reason := module.cannot_serve(request.module.OP, (probe,))):
        pytest.skip(f"{name} backend on {device}: {reason}")
    if request.param == ("triton", "cpu") and (reason := interpreter_fault()):
        pytest.skip(reason)
    return request.param


@cache
def interpreter_fault():
    """Why Triton's interpreter does not work here, or None."""
    import numpy
    import triton as compiler
    from triton.runtime import interpreter

    version = tuple(map(int, compiler.__version__.split(".")[:2]))
    if version < (3, 6):  # it takes the strides of descriptors, in elements, for bytes
        interpreter.TensorDescHandle.validate = lambda self: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            int(numpy.ones(1))
    except TypeError:  # from NumPy 2.4 on; the interpreter then fails in `range` of values it computed
        if version < (3, 7):
            return f"the interpreter of Triton {compiler.__version__} needs NumPy below {numpy.__version__}"
    return None


@pytest.fixture
def backend(place):
    """Force the backend, and make its device the default one."""
    name, device = place
    with backends.use_backend(name), torch.device(device):
        yield name


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Force the native backend, and an instruction set of its kernels; skips, by name, what is not here."""
    if reason := native.unavailable():
        pytest.skip(f"native backend: {reason}")
    if request.param not in compiled._C.isas():
        pytest.skip(f"native backend: this CPU or build has no {request.param}")
    monkeypatch.setenv("MOCO_FAST_ISA", request.param)
    assert compiled._C.isa() == request.param
    with backends.use_backend("native"):
        yield request.param


def with_threads(call):
    """What a call returns with one thread, after the bits of all of it were the same with two and three."""
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call())
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    return found[0]


@pytest.fixture
def half_ulp(place):
    """Relative rounding error of a dtype; twice that where Triton's interpreter truncates to bf16."""
    truncated = torch.bfloat16 if place == ("triton", "cpu") else None
    return lambda dtype: torch.finfo(dtype).eps / (1 if dtype == truncated else 2)


@pytest.fixture
def device(place):
    """The device that the backend runs on."""
    return place[1]


@pytest.fixture
def triton_device():
    """Where Triton runs: a GPU, or a CPU under its interpreter."""
    return "cpu" if triton.interpreted() else "cuda"


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    kind = pytest.importorskip("matplotlib.figure").Figure
    saved, save = [], kind.savefig

    def keep(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(kind, "savefig", keep)
    return saved


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed, and hands on the number of threads it found."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, by name, where torch finds none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    """Say which parts of the library this machine could not test, so that green is not read as complete."""
    missing = []
    if reason := native.unavailable():
        missing.append(f"native CPU kernels ({reason})")
    else:
        built = native.build_info().get("isas", [])
        if unsupported := [isa for isa in built if isa not in compiled._C.isas()]:
            missing.append(f"CPU kernels for {', '.join(unsupported)} (compiled, but this CPU lacks them)")
        if not native.has_bf16_units():
            missing.append("bf16 matrix units (this CPU or build has none; with AVX-512 they were emulated)")
    if reason := triton.cannot_serve("info_nce", ()):
        missing.append(f"Triton kernels ({reason})")
    elif triton.interpreted() and (reason := interpreter_fault()):
        missing.append(f"the results of Triton kernels ({reason})")
    from bench import machines

    if reason := machines.unavailable():
        missing.append(f"several machines ({reason})")
    if not torch.cuda.is_available():
        reports = terminalreporter.getreports("skipped")
        skipped = [r for r in reports if "gpu" in getattr(r, "keywords", ())]  # a skipped module has none
        missing.append(
            f"everything on a GPU (none here: {len(skipped)} tests; Triton ran in the interpreter, CUDA C++ "
            "in an emulator)"
        )
    terminalreporter.write_line(f"NOT TESTED on this machine: {'; '.join(missing) or 'nothing'}")
