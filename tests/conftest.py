"""Shared by all tests: the backends of this machine, and a last line that says what could not be tested."""

import sys
from pathlib import Path

import pytest
import torch

from moco_fast import native

sys.path.append(str(Path(__file__).parent.parent))  # bench/ belongs to the checkout and is not installed

BACKENDS = ("reference", "native")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Force one backend; a machine without the compiled module skips the native one, by name."""
    import moco_fast

    if request.param == "native" and (reason := native.unavailable()):
        pytest.skip(f"native backend: {reason}")
    with moco_fast.use_backend(request.param):
        yield request.param


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
        compiled = native.build_info().get("isas", [])
        if unsupported := [isa for isa in compiled if isa not in native._C.isas()]:
            missing.append(f"CPU kernels for {', '.join(unsupported)} (compiled, but this CPU lacks them)")
        if not native.has_bf16_units():
            missing.append("bf16 matrix units (this CPU has none; the bf16 path ran in fp32)")
    if not torch.cuda.is_available():
        skipped = [r for r in terminalreporter.getreports("skipped") if "gpu" in r.keywords]
        missing.append(f"everything on a GPU (none here; {len(skipped)} tests need one)")
    terminalreporter.write_line(f"NOT TESTED on this machine: {'; '.join(missing) or 'nothing'}")
