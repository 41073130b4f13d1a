"""No CUDA kernel reads or writes outside its tensors: the emulated GPU under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import emulated
import pytest


@cache
def sanitizer():
    """The library that a process whose Python was not compiled with it has to load first."""
    if os.environ.get("CXX", "g++") != "g++" or not shutil.which("g++") or not emulated.CSRC.exists():
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    return found.stdout.strip() if Path(found.stdout.strip()).is_absolute() else None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run bounds.py with some arguments."""
    if not sanitizer():
        pytest.skip("g++ with AddressSanitizer is not installed")
    library = emulated.compiled(tmp_path_factory.mktemp("bounds"), sanitizer=("-fsanitize=address",))
    # Threads are fibers, whose stacks it does not know.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    environment = os.environ | {"LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": options}
    script = Path(__file__).with_name("bounds.py")

    def run(*arguments):
        command = [sys.executable, script, library, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_all_kernels_stay_inside(run):
    done = run("0", "lists", "sweep")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", ["lists", "sweep"])
def test_what_lies_outside_is_seen(run, which):
    done = run("1", which)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
