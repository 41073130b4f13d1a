"""Every GPU kernel of the library at small odd shapes: what compute-sanitizer is run on.

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.sanitize [--ops OP...]``, with
``PYTORCH_NO_CUDA_MEMORY_CACHING=1``: in the blocks of torch's allocator nothing is out of bounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench.case import serving
from moco_fast.data import AugmentConfig, random_view

# N, K, C and dtype. Of every class of tiles one, and no multiple of a tile: addresses depend on no more.
INPUTS = [((37, 257, 37), torch.float32), ((70, 1000, 128), torch.bfloat16)]
PRECISIONS = ("highest", "high")
# N, C and the rest, dtype, channels-last
BATCHES = [
    (shape, dtype, last)
    for shape in ((6, 37, 5, 7), (260, 70), (4, 3, 33, 40))
    for dtype, last in ((torch.float32, False), (torch.bfloat16, True))
]
TENSORS = 900  # more than a launch of a kernel over lists of tensors takes


def rows(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
    """Queries (N, C) with a gradient, keys (N, C), a queue (K, C) and a precision."""
    for ((n, k, c), dtype), precision in product(INPUTS, PRECISIONS):
        q, keys = torch.randn(2, n, c, device=device, dtype=dtype)
        yield q.requires_grad_(), keys, F.normalize(torch.randn(k, c, device=device), dim=1), precision


def info_nce(device: torch.device) -> None:
    for q, keys, queue, precision in rows(device):
        moco_fast.info_nce(q, keys, queue, precision=precision, return_stats=True)[0].backward()
        # The kernel that has to be asked for, of many queries and of few.
        if precision == "high" and "native" in serving("info_nce", (q, keys, queue))[0]:
            mirror = queue.half() if q.is_cuda else queue
            for n in (len(q), len(q) // 2):
                with moco_fast.use_backend("native"):
                    loss, _ = moco_fast.info_nce(q[:n], keys[:n], mirror, return_stats=True)
                loss.backward()


def nt_xent(device: torch.device) -> None:
    for q, keys, _, precision in rows(device):
        moco_fast.nt_xent(q, keys.requires_grad_(), 0.1, precision=precision).backward()


def contrast(device: torch.device) -> None:
    for q, keys, _, precision in rows(device):
        moco_fast.contrast(q, keys.requires_grad_(), 0.1, precision=precision).backward()


def dino(device: torch.device) -> None:
    for q, keys, queue, precision in rows(device):
        prototypes, center = queue.clone().requires_grad_(), torch.randn(len(queue), device=device)
        moco_fast.dino(q, keys, prototypes, queue, center, precision=precision).backward()


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Some of each kind: small, of odd sizes, of several blocks, a view off its alignment, and many.

    The many share their memory: a thousand allocations take longer under the sanitizer than all kernels.
    """
    shapes = [(9001,), (37,), (5, 3, 3, 3), (1000, 70)]
    shifted, *others = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    many = torch.randn(TENSORS, 4, device=device, dtype=dtype)[:, :3]
    return [shifted[1:], *others, *many.unbind()]


def ema_update_(device: torch.device) -> None:
    sources = tensors(device)
    moco_fast.ema_update_(tensors(device), sources, 0.99)
    moco_fast.ema_update_(tensors(device, torch.bfloat16), sources, 0.99, masters=tensors(device))


def fused_step(device: torch.device) -> None:
    for make in (moco_fast.SGD, moco_fast.AdamW, moco_fast.LARS):
        params, keys = tensors(device), tensors(device)
        for param, grad in zip(params, tensors(device), strict=True):
            param.requires_grad_().grad = grad
        options = {} if make is moco_fast.AdamW else {"momentum": 0.9}
        optimizer = make(params, lr=0.1, **options, ema=list(zip(keys, params, strict=True)))
        optimizer.step()
        optimizer.step()  # with a momentum


def enqueue_(device: torch.device) -> None:
    for _, keys, queue, _ in rows(device):
        ptr = torch.tensor([len(queue) - 2], device=device)  # wraps
        order = torch.arange(len(keys), device=device)
        moco_fast.enqueue_(queue, ptr, keys, queue.half(), order)


def split_batch_norm(device: torch.device) -> None:
    for shape, dtype, last in BATCHES:
        x = torch.randn(shape, device=device, dtype=dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        weight, bias = torch.randn(2, shape[1], device=device)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        moco_fast.split_batch_norm(*inputs, 2)[0].square().sum().backward()


def take_rows(device: torch.device) -> None:
    for _, keys, queue, _ in rows(device):
        moco_fast.take_rows(queue, torch.randint(len(queue), (len(keys),), device=device))


def augment(device: torch.device) -> None:
    """Views of several tiles, of none that is whole, and of one channel; with every step and with none."""
    for channels, side, size, dtype in ((3, 45, 70, torch.bfloat16), (1, 28, 17, torch.float32)):
        images = torch.randint(256, (3, channels, side, side + 3), dtype=torch.uint8, device=device)
        config = AugmentConfig(image_size=size, jitter_p=0.7, gray_p=0.5, blur_p=0.7)
        drawn = torch.Generator().manual_seed(0)
        random_view(images, config, [0.5] * channels, [0.2] * channels, drawn, dtype=dtype)


# By name in bench/ops.py: the calls, and the op whose backends they run on.
CALLS = {
    "info_nce": (info_nce, "info_nce"),
    "nt_xent": (nt_xent, "nt_xent"),
    "contrast": (contrast, "contrast"),
    "dino": (dino, "dino"),
    "ema_update_": (ema_update_, "ema_update_"),
    "fused step": (fused_step, "sgd_"),
    "enqueue_": (enqueue_, "enqueue_"),
    "split_batch_norm": (split_batch_norm, "split_batch_norm"),
    "take_rows": (take_rows, "take_rows"),
    "augment": (augment, "augment"),
}


def kernels(op: str, device: torch.device) -> list[str]:
    """Backends with kernels of ours; the reference is PyTorch's own."""
    return [name for name in serving(op, [torch.empty(1, 1, device=device)])[0] if name != "reference"]


def main(arguments: list[str] | None = None) -> None:
    """Call everything on every backend that has kernels for it, and wait."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="whose kernels")
    parser.add_argument("--ops", nargs="+", choices=CALLS, default=list(CALLS), metavar="OP")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for name in options.ops:
        calls, op = CALLS[name]
        backends = kernels(op, device)
        if not backends:
            raise SystemExit(f"no kernels of {name} on {device}")
        for backend in backends:
            with moco_fast.use_backend(backend):
                calls(device)
            print(f"called {name} on {device}, {backend}")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
