"""No kernel reads or writes outside its tensors: the emulated GPU and the CPU's under AddressSanitizer."""

import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import emulated
import pytest

CPU_OPTIONS = (
    "-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-fsanitize=address", "-DMOCO_FAST_ISA=baseline",
)  # fmt: skip
CPU_OPS = (
    "info_nce", "contrast", "nt_xent", "dino_op", "split_batch_norm", "enqueue", "take_rows", "ema_update",
    "optim", "augment",
)  # fmt: skip


@cache
def sanitizer():
    """The library that a process whose Python was not compiled with it has to load first."""
    if os.environ.get("CXX", "g++") != "g++" or not shutil.which("g++") or not emulated.CSRC.exists():
        return None
    found = library_of_compiler("libasan.so")
    return found if Path(found).is_absolute() else None


def library_of_compiler(name):
    """Its path; the bare name where g++ has none."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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


@pytest.fixture(scope="module")
def run_on_cpu(tmp_path_factory):
    """Run bounds_cpu.py with some arguments."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: no module can be compiled")
    headers = sysconfig.get_paths()["include"]
    if not sanitizer() or not Path(headers, "Python.h").exists():
        pytest.skip("g++ with AddressSanitizer, or Python's headers, are not installed")
    module = tmp_path_factory.mktemp("bounds") / "_C.so"
    includes = f"-I{pybind11.get_include()}", f"-I{headers}"
    subprocess.run(["g++", *CPU_OPTIONS, *includes, *emulated.CSRC.glob("*.cpp"), "-o", module], check=True)
    # The sanitizer passes exceptions on, to a library that Python does not load first.
    libraries = f"{sanitizer()} {library_of_compiler('libstdc++.so')}"
    environment = {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}

    def run(*arguments):
        command = [sys.executable, Path(__file__).with_name("bounds_cpu.py"), module, *arguments]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    return run


def test_all_kernels_of_the_cpu_stay_inside(run_on_cpu):
    files = [Path(__file__).with_name(f"test_{op}.py") for op in CPU_OPS]
    chosen = ("-k", "(native-cpu or bf16_path) and not compile and not opcheck")
    done = run_on_cpu("-q", "-s", "-p", "no:cacheprovider", *chosen, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


def test_what_lies_outside_is_seen_on_the_cpu(run_on_cpu):
    done = run_on_cpu()
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
