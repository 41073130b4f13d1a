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
import torch

CPU_OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fsanitize=address", f"-I{emulated.CSRC}")
# As on a CPU with AVX-512 and AMX: on one with AVX-512 it runs the kernels for both.
AMX = Path(__file__).with_name("amx")
AMX_OPTIONS = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-D__AMX_BF16__",
    "-DMOCO_FAST_AMX", f"-I{AMX}",
)  # fmt: skip
CPU_OPS = (
    "info_nce", "info_nce_amx", "contrast", "nt_xent", "dino_op", "split_batch_norm", "enqueue", "take_rows",
    "ema_update", "optim", "augment",
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


@pytest.fixture(scope="module", params=["baseline", "amx"])
def run_on_cpu(request, tmp_path_factory):
    """Run bounds_cpu.py with some arguments."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: no module can be compiled")
    headers = sysconfig.get_paths()["include"]
    if not sanitizer() or not Path(headers, "Python.h").exists():
        pytest.skip("g++ with AddressSanitizer, or Python's headers, are not installed")
    folder = tmp_path_factory.mktemp("bounds")
    module = folder / "_C.so"
    command = ["g++", *CPU_OPTIONS, f"-I{pybind11.get_include()}", f"-I{headers}"]
    sources = set(emulated.CSRC.glob("*.cpp"))
    if request.param == "amx":
        if not torch.cpu._is_avx512_supported():
            pytest.skip("bf16 matrix units: emulated by AVX-512, which this CPU has not")
        command += AMX_OPTIONS
        units, sources = emulated.CSRC / "info_nce_amx.cpp", sources - {emulated.CSRC / "cpu_features.cpp"}
        sources = sources - {units} | {AMX / "cpu_features.cpp", folder / "amx.o"}
        subprocess.run([*command, "-DMOCO_FAST_ISA=amx", "-c", units, "-o", folder / "amx.o"], check=True)
    subprocess.run([*command, "-DMOCO_FAST_ISA=baseline", "-shared", *sources, "-o", module], check=True)
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
    chosen = ("-k", "(native-cpu or matrix_units) and not compile and not opcheck")
    done = run_on_cpu("-q", "-s", "-p", "no:cacheprovider", *chosen, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


def test_what_lies_outside_is_seen_on_the_cpu(run_on_cpu):
    done = run_on_cpu()
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
