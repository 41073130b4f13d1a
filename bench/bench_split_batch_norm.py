"""split_batch_norm of a ResNet's activations, forward and gradients to x, weight and bias.

5 values of traffic per value of x, if each pass over a part finds it in the cache
that the pass before read it into: the forward reads x and writes y, the backward
reads x and dy and writes dx. 8 where it does not. About 16 FLOP per value.

The official way, that of MoCo's notebook for CIFAR, takes every S-th sample for a
part, which makes all parts a view of S C channels. A view of channels-last images
that way there is none: there the official way is the loop over the parts.
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
from bench.case import BY_HAND, NATIVE, OFFICIAL, OURS, REFERENCE, Absent, Case, Peer, bind, relative, serving
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
COMPILED, LOOP, COMPILED_LOOP = "torch.compile", "loop over the parts", "torch.compile, loop"
PEERS = [NATIVE, REFERENCE, COMPILED, BY_HAND, OFFICIAL]
CPU = torch.device("cpu")

Op = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # x (N, C, H, W), weight, bias (C), parts -> y


def loop(x: Tensor, weight: Tensor, bias: Tensor, splits: int) -> Tensor:
    """Every part by itself, then a copy: consecutive samples are a part."""
    return torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in x.chunk(splits)])


def notebook(x: Tensor, weight: Tensor, bias: Tensor, splits: int) -> Tensor:
    """One batch norm of the view (N / S, S C, H, W): every S-th sample is of a part, nothing is copied."""
    n, c, h, w = x.shape
    beside = x.view(n // splits, splits * c, h, w)
    return F.batch_norm(beside, None, None, weight.repeat(splits), bias.repeat(splits), True).view(x.shape)


def beside(x: Tensor, splits: int) -> Tensor:
    """Consecutive parts in the order that makes every S-th sample one of them."""
    return x.unflatten(0, (splits, -1)).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def by_hand(x: Tensor, weight: Tensor, bias: Tensor, splits: int, dy: Tensor) -> tuple[Tensor, ...]:
    """The ops behind F.batch_norm and its backward, part by part into one result."""
    y, dx, dw, db = (torch.empty_like(t) for t in (x, x, weight, bias))
    dw.zero_(), db.zero_()
    parts = [t.chunk(splits) for t in (x, dy, y, dx)]
    for x_part, dy_part, y_part, dx_part in zip(*parts, strict=True):
        saved = (torch.empty(0, device=x.device) for _ in range(2))
        _, mean, inverse = torch.ops.aten.native_batch_norm.out(
            x_part, weight, bias, None, None, True, 0.1, 1e-5,
            out=y_part, save_mean=next(saved), save_invstd=next(saved),
        )  # fmt: skip
        found = torch.ops.aten.native_batch_norm_backward(
            dy_part, x_part, weight, None, None, mean, inverse, True, 1e-5, [True, True, True]
        )
        dx_part.copy_(found[0])
        dw += found[1]
        db += found[2]
    return y, dx, dw, db


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

    def peer(run: Callable[..., tuple[Tensor, ...]], every: bool = False) -> Peer:
        """A peer, of which consecutive samples are a part or ``every`` S-th one."""
        of = partial(beside, splits=splits) if every else lambda t: t
        given = [of(x.detach()).requires_grad_(), *inputs[1:], splits, of(dy)]
        wanted = [of(want[0]), of(want[1]), *want[2:]]

        def errors(run: Callable[..., tuple[Tensor, ...]]) -> dict[str, float]:
            got = run(*given)
            if got[0].stride() != x.stride():
                raise Absent("it changes the memory format")
            names = ("y", "dx", "dw", "db")
            return {name: relative(a, b) for name, a, b in zip(names, got, wanted, strict=True)}

        return bind(run, errors, *given, tolerance=1e-4 if dtype == torch.float32 else 1e-2)

    def op(run: Op, **options: bool) -> Peer:
        return peer(partial(with_gradients, run), **options)

    backends, absent = serving("split_batch_norm", (x,))
    peers = {f"{OURS} {backend}": op(partial(ours, backend)) for backend in backends}
    peers[BY_HAND] = peer(by_hand)
    if channels_last:
        peers |= {COMPILED: op(compile_later(loop, dynamic=False)), OFFICIAL: op(loop)}
    else:
        peers |= {
            COMPILED: op(compile_later(notebook, dynamic=False), every=True),
            COMPILED_LOOP: op(compile_later(loop, dynamic=False)),
            LOOP: op(loop),
            OFFICIAL: op(notebook, every=True),
        }
    label = f"{n}x{c}x{side}x{side}, S={splits}, {str(dtype).removeprefix('torch.')}"
    label += ", channels-last" if channels_last else ""
    values = x.numel()
    return Case("split_batch_norm", label, peers, 16.0 * values, 5.0 * values * dtype.itemsize, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=str)
def test_split_batch_norm(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
