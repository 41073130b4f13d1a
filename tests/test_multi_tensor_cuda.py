"""What nvcc makes of the multi-tensor kernels, and how they take numbers; needs no GPU.

What they compute, the tests of the ops show: a place where those run is an emulated GPU.
"""

import re
import subprocess

import emulated
import pytest
import torch
from emulated import CSRC
from nvcc import compiled, find

from moco_fast import native

SOURCES = sorted(p.name for p in CSRC.glob("*.cu") if "multi_tensor_cuda.h" in p.read_text())
ARCHITECTURES = ("sm_80", "sm_90a")


@pytest.mark.skipif(not CSRC.exists(), reason="an installed wheel has no sources")
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_wide_accesses(source, tmp_path):
    cuobjdump = find("cuobjdump")
    made, kernels, _ = compiled(source, ARCHITECTURES, tmp_path)
    assert kernels >= len(ARCHITECTURES)

    for architecture in ARCHITECTURES:
        sass = subprocess.run(
            [cuobjdump, "-sass", "-arch", architecture, made], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r"\bLDG\.E(\.\w+)*\.128\b", sass) and re.search(r"\bSTG\.E(\.\w+)*\.128\b", sass)
        assert not re.search(r"\b(LDL|STL)\b", sass), "local memory"
        # The table stays in the constant bank: read there by a block-dependent offset, never copied.
        assert re.search(r"\bU?LDC(\.\w+)* U?R\d+, c\[0x0\]\[U?R\d+", sass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_that_only_the_gpu_knows(dtype):
    """Momentum and learning rate are read where they lie: the value beside the address is not looked at."""
    code = native.DTYPES[dtype]
    m, lr = (torch.tensor([x], dtype=dtype) for x in (0.9, 0.05))
    at_address, numbers = [], []
    for found, (lr_, m_) in (
        (at_address, [(float("nan"), x.data_ptr(), code) for x in (lr, m)]),
        (numbers, [(x.item(), 0, native.DTYPES[torch.float64]) for x in (lr, m)]),
    ):
        generator = torch.Generator().manual_seed(0)
        param, grad, buffer, key = torch.randn(4, 9001, generator=generator).unbind()
        roles = [[x.data_ptr()] for x in (param, grad, buffer, key)]
        rows = emulated.MultiTensor.Rows(roles, [9001], [[0]] * 4)
        step = (0.9, 0.0, 1e-4, 0.0, False, False, False)
        emulated.MultiTensor.sgd_step(rows, step, lr_, m_, 0, 1, 0)
        found += [param, buffer, key]
    for got, want in zip(at_address, numbers, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # 1 - m in the precision of m
        assert got.isfinite().all()


def test_the_rest_of_a_momentum_is_in_its_own_precision():
    """As in torch, where ``1 - m`` of a float32 tensor is float32 before it meets float64."""
    m = torch.tensor(0.1)
    target, source = torch.randn(2, 100, dtype=torch.float64).unbind()
    want = target * m + source * (1 - m)
    codes = [[native.DTYPES[torch.float64]]] * 2
    rows = emulated.MultiTensor.Rows([[target.data_ptr()], [source.data_ptr()]], [100], codes)
    emulated.MultiTensor.ema_update(rows, (float("nan"), m.data_ptr(), native.DTYPES[m.dtype]), 1, 0)
    assert torch.equal(target, want)


@pytest.mark.parametrize("odd", range(5), ids=["param", "grad", "average", "square", "key"])
def test_vectors_want_every_role_aligned(odd):
    """Wide accesses to the one that is not would end the process."""
    values, code = torch.rand(5, 48), native.DTYPES[torch.float32]
    found = []
    for shifted in (None, odd):
        places = [torch.empty(49)[int(i == shifted) :][:48].copy_(x) for i, x in enumerate(values)]
        step = torch.ones(())
        roles = [[x.data_ptr()] for x in (*places, step)]
        rows = emulated.MultiTensor.Rows(roles, [48], [[code]] * 6)
        number = (0.9, 0, native.DTYPES[torch.float64])
        emulated.MultiTensor.adamw_step(rows, (0.9, 0.99, 1e-8, 0.1, False), number, number, 1, 0)
        found.append(places)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
