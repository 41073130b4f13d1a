"""Tests of CPU kernels that were compiled in another way: a process of test_bounds.py and test_build.py.

``python bounds_cpu.py MODULE [PYTEST_ARGUMENT...]``, with the module in place of ``moco_fast._C``; without
arguments of pytest a kernel is told of more rows than there are, which AddressSanitizer should see.
"""

import importlib.util
import sys

import pytest
import torch

spec = importlib.util.spec_from_file_location("moco_fast._C", sys.argv[1])
kernels = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(pytest.main(sys.argv[2:]))
    z, loss = torch.randn(6, 40), torch.empty(8)
    kernels.nt_xent(z.data_ptr(), 0, 8, 40, 0.1, loss.data_ptr(), 0, 1)
