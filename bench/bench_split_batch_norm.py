"""split_batch_norm of a ResNet's activations, forward and gradients to x, weight and bias.

8 values of traffic per value of x: the forward reads it twice and writes y, the
backward reads x and dy twice and writes dx. About 16 FLOP per value. The
official way is a loop over the parts and a copy of their results together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Absent, Case, Peer, bind, relative, serving
from bench.compiling import compile_later

# N, C, height and width, parts, channels-last, dtype
Size = tuple[int, int, int, int, bool, torch.dtype]
SIZES: dict[str, list[Size]] = {
    "cpu": [
        (256, 16, 28, 8, False, torch.float32),
        (256, 16, 28, 8, True, torch.float32),
        (256, 64, 7, 4, False, torch.float32),
        (256, 64, 7, 4, True, torch.float32),
        (128, 64, 14, 2, True, torch.bfloat16),
    ],
    "cuda": [
        (256, 64, 112, 8, True, torch.bfloat16),
        (256, 256, 56, 8, True, torch.bfloat16),
        (256, 256, 56, 8, False, torch.bfloat16),
        (256, 2048, 7, 8, True, torch.bfloat16),
    ],
}
QUICK: list[Size] = [(8, 16, 5, 2, True, torch.float32), (8, 16, 5, 2, False, torch.float32)]
COMPILED, VIEW = "torch.compile", "view as S C channels"
PEERS = [NATIVE, REFERENCE, COMPILED, VIEW, OFFICIAL]
CPU = torch.device("cpu")

Op = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # x (N, C, H, W), weight, bias (C), parts -> y


def loop(x: Tensor, weight: Tensor, bias: Tensor, splits: int) -> Tensor:
    """What SplitBatchNorm layers do: every part by itself, then a copy."""
    return torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in x.chunk(splits)])


def view(x: Tensor, weight: Tensor, bias: Tensor, splits: int) -> Tensor:
    """One batch norm of (N/S, S C, H, W), sample i of all parts together, which takes copies to and fro."""
    n, c, h, w = x.shape
    beside = x.view(splits, n // splits, c, h, w).transpose(0, 1).reshape(n // splits, splits * c, h, w)
    y = F.batch_norm(beside, None, None, weight.repeat(splits), bias.repeat(splits), True)
    return y.reshape(n // splits, splits, c, h, w).transpose(0, 1).reshape(n, c, h, w)


def ours(backend: str, x: Tensor, weight: Tensor, bias: Tensor, splits: int) -> Tensor:
    with moco_fast.use_backend(backend):
        return moco_fast.split_batch_norm(x, weight, bias, splits)[0]


def with_gradients(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor, splits: int, dy: Tensor
) -> tuple[Tensor, ...]:
    y = op(x, weight, bias, splits)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)


@cache
def case(size: Size, device: torch.device = CPU) -> Case:
    """The case of one size."""
    n, c, side, splits, channels_last, dtype = size
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, dy = (random(n, c, side, side).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    x += 0.5
    weight, bias = random(c), random(c)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = with_gradients(loop, *exact, splits, dy.double())
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def errors(run: Callable[..., tuple[Tensor, ...]]) -> dict[str, float]:
        got = run(*inputs, splits, dy)
        if got[0].stride() != x.stride():
            raise Absent("it changes the memory format")
        return {name: relative(a, b) for name, a, b in zip(("y", "dx", "dw", "db"), got, want, strict=True)}

    def peer(op: Op) -> Peer:
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        return bind(partial(with_gradients, op), errors, *inputs, splits, dy, tolerance=tolerance)

    backends, absent = serving("split_batch_norm", (x,))
    peers = {f"{OURS} {backend}": peer(partial(ours, backend)) for backend in backends}
    peers |= {COMPILED: peer(compile_later(loop, dynamic=False)), VIEW: peer(view), OFFICIAL: peer(loop)}
    label = f"{n}x{c}x{side}x{side}, S={splits}, {str(dtype).removeprefix('torch.')}"
    label += ", channels-last" if channels_last else ""
    values = x.numel()
    return Case("split_batch_norm", label, peers, 16.0 * values, 8.0 * values * dtype.itemsize, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=str)
def test_split_batch_norm(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
