"""The CUDA kernels on the emulated GPU, compiled with AddressSanitizer: a process of test_bounds.py.

``python bounds.py LIBRARY BEYOND {lists,sweep}...``: told of so many elements, or rows, more than there are.
"""

import ctypes
import sys

import emulated
import torch

from moco_fast import native

SIZES = [1, 37, 8191, 8192, 20_001]  # of blocks of 8192 elements in vectors of 16 bytes


def lists(beyond):
    """EMA with a copy in low precision, SGD, LARS and AdamW over tensors of odd sizes and alignments."""
    kernels = emulated.MultiTensor
    number = (0.9, 0, native.DTYPES[torch.float64])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for offset in (0, 1):
            tensors = [[torch.randn(size + offset).to(dtype)[offset:] for size in SIZES] for _ in range(5)]
            sizes = [size + beyond for size in SIZES]
            steps = [torch.ones(()) for _ in SIZES]

            def rows(*roles, sizes=sizes):
                addresses = [[tensor.data_ptr() for tensor in role] for role in roles]
                return kernels.Rows(addresses, sizes, [[native.DTYPES[t.dtype] for t in r] for r in roles])

            kernels.ema_update(rows(*tensors[:2]), number, 1, 0)
            if dtype != torch.float64:
                masters = [tensor.float() for tensor in tensors[0]]
                kernels.ema_update(rows(*tensors[:2], masters), number, 1, 0)
            for trust in (0.0, 0.001):
                step = (0.9, 0.0, 1e-4, trust, True, False, False)
                kernels.sgd_step(rows(*tensors[:4]), step, number, number, 0, 1, 0)
            kernels.adamw_step(rows(*tensors, steps), (0.9, 0.99, 1e-8, 0.1, False), number, number, 1, 0)


def sweep(beyond):
    """Few queries and many, and queues that end within a tile."""
    for n, slots, features in ((20, 300, 128), (70, 400, 72)):
        q, k = torch.randn(2, n, features).unbind()
        queue = torch.randn(slots, features).half()[: slots - beyond].clone()
        pairs, shares = [torch.empty(n) for _ in range(3)], 2
        found = [torch.empty(shares, n, features), *(torch.empty(shares, n) for _ in range(3))]
        found.append(torch.empty(shares, n, dtype=torch.int32))
        args = emulated.sweep_arguments(q, k, queue, pairs, found, 2, (1.0, 1.0, 15.0), False)
        args.slots = slots
        emulated.call("info_nce_sweep", ctypes.byref(args))


if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1])
    emulated.library = lambda: library
    for name in sys.argv[3:]:
        {"lists": lists, "sweep": sweep}[name](int(sys.argv[2]))
