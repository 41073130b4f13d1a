"""The sweep written for Hopper: what nvcc makes of it, and that the emulated GPU sees faults in it."""

import ctypes
import re
import shutil
import subprocess
import sysconfig

import emulated
import pytest
import torch
from nvcc import compiled, find
from test_info_nce import make, relative
from test_info_nce_sweep import sweep
from torch.nn import functional as F
from wgmma import hazards


@pytest.mark.skipif(not emulated.CSRC.exists(), reason="an installed wheel has no sources")
def test_no_spills_and_no_product_waits_for_another(tmp_path):
    cuobjdump = find("cuobjdump")
    made, count, said = compiled("info_nce_sweep_cuda.cu", ("sm_90a",), tmp_path)
    assert count == 8
    assert "wgmma" not in said, "ptxas says that it serialises products"
    sass = subprocess.run([cuobjdump, "-sass", made], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 8
    for code in kernels:
        fetching = code.split("USETMAXREG.DEALLOC")[1].split("EXIT", 1)[0]
        assert not re.search(r"\b(LDL|STL)\b", code)
        # The queries are published before products read them, which the emulator does not see.
        assert re.search(r"\bSTS\.64\b.*?FENCE\.VIEW\.ASYNC.*?\bBAR\.SYNC.*?\bHGMMA", code, re.DOTALL)
        # ptxas leaves the exponentials beside the products that they do not need, in both walks.
        beside = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", code, re.DOTALL)
        assert [part.count("MUFU.EX2") >= 64 for part in beside] == [True, True]
        # Two walks, each with a first, a repeated and a last step: 8 + 16 + 8 products, begun once a step.
        assert len(re.findall(r"\bHGMMA\.64x128x16", code)) == 64
        assert len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code)) == 6
        assert not hazards(code) and hazards(re.sub(r"WARPGROUP\.DEPBAR[^;]*", "NOP", code))
        assert "UTMALDG.2D" in fetching
        assert max(map(int, re.findall(r"\bR(\d+)\b", fetching))) < 24  # what setmaxnreg leaves it


@pytest.mark.skipif(not emulated.CSRC.exists(), reason="an installed wheel has no sources")
def test_bindings_give_every_field_of_the_arguments():
    """The emulator fills them by itself, and the compiler only warns."""
    pybind11 = pytest.importorskip("pybind11")
    if not (compiler := shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    strict = ["-Wextra", "-Werror=missing-field-initializers", "-Werror=narrowing"]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-DMOCO_FAST_CUDA", *strict, *includes]
    done = subprocess.run([*command, emulated.CSRC / "bindings.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is wrong, the place in the kernel and what stands there then, and what is told; None: wrong sums.
FAULTS = {
    "a tile is freed before it was read": (
        "            wait_products<0>();\n            written_by_products(found.sums);\n            release",
        "            written_by_products(found.sums);\n            release",
        None,
    ),
    "a tile is never freed": (
        "            release(ring, before);\n            if constexpr",
        "            if constexpr",
        "deadlock",
    ),
    "sums of a partner are read before they are there": (
        "sync_cluster();\n        partner",
        "partner",
        "threads expect different numbers",
    ),
    "a block ends before its partner has read": (
        "        if constexpr (kMany) arrive_cluster();\n",
        "",
        "without having arrived",
    ),
    "exponentials are rounded into registers under way": (
        "            await(tile + step);\n            wait_products<0>();",
        "            round_exponentials();\n            await(tile + step);\n            wait_products<0>();",
        None,
    ),
}


@pytest.mark.skipif(not emulated.CSRC.exists(), reason="an installed wheel has no sources")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, tmp_path):
    csrc = shutil.copytree(emulated.CSRC, tmp_path / "csrc")
    kernel = csrc / "info_nce_sweep_kernel.h"
    right, wrong, told = FAULTS[fault]
    text = kernel.read_text()
    assert text.count(right) == 1, "the kernel has changed: name the fault anew"
    kernel.write_text(text.replace(right, wrong))
    kernels = ctypes.CDLL(emulated.compiled(tmp_path, ("info_nce_sweep",), csrc))

    q, k, queue = make(70, 3400, 128, queue_dtype=torch.float16)
    if told:
        with pytest.raises(RuntimeError, match=told):
            sweep(q, k, queue, 0.2, 1, 27, kernels=kernels)
        return
    *_, sums, _, shifts, _, _ = sweep(q, k, queue, 0.2, 1, 27, kernels=kernels)
    want = torch.exp(F.normalize(q.double(), dim=1) @ queue.double().t() / 0.2) @ queue.double()
    assert not relative((sums * torch.exp2(shifts.double())[:, :, None]).sum(0), want) < 1e-2
