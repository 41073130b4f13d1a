"""Every GPU kernel of the library once or twice at small odd shapes: what compute-sanitizer is run on.

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.sanitize``
"""

from __future__ import annotations

import torch
from torch import Tensor

import moco_fast
from bench.bench_fused_step import OPTIMIZERS, FusedStep
from bench.case import serving

SHAPES = [(5, 257, 37), (37, 1000, 128)]  # N, K, C: no multiple of a tile, and one that is
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("highest", "high", "medium")


def kernels(op: str, *tensors: Tensor) -> list[str]:
    """Backends with kernels of ours; the reference is PyTorch's own."""
    return [name for name in serving(op, tensors)[0] if name != "reference"]


def main() -> None:
    """Call everything, wait, and say how much that was."""
    device = torch.device("cuda")
    calls = 0
    for n, k, c in SHAPES:
        for dtype in DTYPES:
            q = torch.randn(n, c, device=device, dtype=dtype, requires_grad=True)
            keys = torch.randn(n, c, device=device, dtype=dtype)
            queue = torch.nn.functional.normalize(torch.randn(k, c, device=device), dim=1)
            for name in kernels("info_nce", q, keys, queue):
                for precision in PRECISIONS:
                    with moco_fast.use_backend(name):
                        loss, _ = moco_fast.info_nce(q, keys, queue, precision=precision, return_stats=True)
                        loss.backward()
                    calls += 1
            trained = keys.clone().requires_grad_()  # both take a gradient to either side
            for op, loss_of in (("nt_xent", moco_fast.nt_xent), ("contrast", moco_fast.contrast)):
                for name in kernels(op, q, keys):
                    for precision in PRECISIONS:
                        with moco_fast.use_backend(name):
                            loss_of(q, trained, 0.1, precision=precision).backward()
                        calls += 1
            center = torch.randn(k, device=device)
            prototypes = queue.clone().requires_grad_()
            for name in kernels("dino", q, keys, queue):
                for precision in PRECISIONS:
                    with moco_fast.use_backend(name):
                        moco_fast.dino(q, keys, prototypes, queue, center, precision=precision).backward()
                    calls += 1
            for name in kernels("ema_update_", keys):
                with moco_fast.use_backend(name):
                    moco_fast.ema_update_([keys, keys[0].clone()], [q.detach(), q.detach()[0]], 0.99)
                calls += 1
            for name in kernels("enqueue_", queue, keys):
                ptr = torch.tensor([k - 2], device=device)
                with moco_fast.use_backend(name):
                    moco_fast.enqueue_(queue, ptr, keys, queue.half(), torch.arange(len(keys), device=device))
                calls += 1
            for name in kernels("take_rows", queue):
                with moco_fast.use_backend(name):
                    moco_fast.take_rows(queue, torch.randint(len(queue), (n,), device=device))
                calls += 1
    for shape in ((6, 37, 5, 7), (260, 70), (4, 3, 33, 40)):
        for dtype in DTYPES:
            for last in (False, True):
                x = torch.randn(shape, device=device, dtype=dtype)
                x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
                x.requires_grad_()
                weight, bias = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
                for name in kernels("split_batch_norm", x):
                    with moco_fast.use_backend(name):
                        moco_fast.split_batch_norm(x, weight, bias, 2)[0].square().sum().backward()
                    calls += 2
    start = [torch.randn(shape, device=device) for shape in ((37,), (5, 3, 3, 3), (1000, 7))]
    for optimizer in OPTIMIZERS:
        for name in kernels(f"{optimizer.lower()}_", *start) if hasattr(moco_fast, optimizer) else ():
            step = FusedStep(start, optimizer, name)
            step.run()
            step.run()  # with a momentum
            calls += 2
    torch.cuda.synchronize()
    print(f"{calls} calls of GPU kernels")


if __name__ == "__main__":
    main()
