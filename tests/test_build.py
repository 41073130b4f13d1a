"""setup.py: what it builds with which compiler, and that it survives without one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import emulated
import pytest

from moco_fast import native

ROOT = emulated.CSRC.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OPS = "info_nce", "contrast", "split_batch_norm", "take_rows", "ema_update", "optim", "augment"
pytestmark = [
    pytest.mark.skipif(not emulated.CSRC.exists(), reason="an installed wheel has no sources"),
    pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="setuptools is not installed"),
]


@pytest.fixture
def build(tmp_path):
    """Build into a folder; the module's path, what was recorded and what was said."""

    def build(**environment):
        folders = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "objects"]
        environment = {"MOCO_FAST_NO_CUDA": "1", "MOCO_FAST_NO_NATIVE": "", "CXXFLAGS": ""} | environment
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", *folders],
            cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        package = tmp_path / "lib" / "moco_fast"
        return package / f"_C{SUFFIX}", json.loads((package / "_build_info.json").read_text()), done.stderr

    return build


@pytest.fixture(scope="module")
def compiler():
    """One of those that setup.py looks for, with all that it needs."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    for module in ("pybind11", "ninja"):
        pytest.importorskip(module, reason=f"{module} is not installed: no module can be compiled")
    return shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler is installed")


def check(module):
    """The ops' own tests, with this module in place of the installed one."""
    here = Path(__file__)
    tests = [here.with_name(f"test_{op}.py") for op in OPS]
    chosen = ("-k", "native-cpu and not compile and not clustered")
    command = [sys.executable, here.with_name("bounds_cpu.py"), module, "-q", "-p", "no:cacheprovider"]
    environment = {"PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *chosen, *tests], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr


def script(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_other_processors_and_a_broken_nvcc(build, compiler, tmp_path):
    """As on ARM: nothing that x86 alone has is compiled, and there are fused products, for few sources.

    What nvcc cannot compile is left out.
    """
    of_arm = 'if [ "$*" = -dumpmachine ]; then echo aarch64-linux-gnu; exit; fi'
    cxx = script(tmp_path / "arm" / "c++", f'{of_arm}\nexec {compiler} "$@"')
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", "echo 'fatal: unsupported GNU version' >&2; exit 1")
    has_fma = native.unavailable() is None and "avx2" in native.compiled._C.isas()
    fused = "-mfma -ffp-contract=fast" if has_fma else ""
    cuda = {"CUDA_HOME": str(nvcc.parents[1]), "MOCO_FAST_NO_CUDA": ""}
    module, info, said = build(CXX=str(cxx), CXXFLAGS=fused, **cuda)
    assert info["native"] and not info["cuda"] and info["isas"] == ["baseline"]
    assert "unsupported GNU version" in info["why"] and info["why"] in said
    check(module)


def test_a_compiler_without_the_matrix_units(build, compiler, tmp_path):
    """It costs their kernel alone."""
    refuses = 'case " $* " in *" -mamx-tile "*) echo "error: unrecognized option"; exit 1;; esac'
    cxx = script(tmp_path / "old" / "c++", f'{refuses}\nexec {compiler} "$@"')
    module, info, _ = build(CXX=str(cxx), CXXFLAGS="-O0")
    assert info["native"]
    asks = "import bounds_cpu; print(bounds_cpu.kernels.has_amx())"
    done = subprocess.run(
        [sys.executable, "-c", asks, module], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
def test_clang(build, compiler):
    module, info, _ = build(CXX="clang++")
    assert info["native"] and "clang" in info["compiler"]
    check(module)


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        ({"CXX": "false"}, "false failed"),
        ({"MOCO_FAST_NO_NATIVE": "1"}, "MOCO_FAST_NO_NATIVE is set"),
    ],
    ids=["no compiler", "a broken one", "not wanted"],
)
def test_without_a_compiler_it_is_pure_python(build, tmp_path, environment, why):
    stale = tmp_path / "lib" / "moco_fast" / f"_C{SUFFIX}"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    module, info, said = build(**environment)
    assert module == stale and not module.exists()
    assert not info["native"] and info["why"].startswith(f"pure Python: {why}") and info["why"] in said
