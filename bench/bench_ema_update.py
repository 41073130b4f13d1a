"""ema_update_ of all parameters of an encoder, fp32.

On a CPU a ResNet-50, 25.6 M parameters; on a GPU that of MoCo v2, with the projection MLP, 28.0 M.

12 bytes per parameter: two reads, one write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torchvision import models

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Case, Peer, bind, relative, serving
from moco_fast.models.heads import insert_mlp

MOMENTUM = 0.999
MLP = " with MLP"  # after the name of a model in torchvision.models
SIZES, QUICK, GPU_SIZES = ["resnet50"], ["squeezenet1_1"], ["resnet50" + MLP]
CPU = torch.device("cpu")
LERP, MUL_ADD = "torch._foreach_lerp_", "torch._foreach_mul_, _add_"
PEERS = [NATIVE, REFERENCE, LERP, MUL_ADD, OFFICIAL]

Run = Callable[[list[Tensor], list[Tensor]], None]  # moves the targets towards the sources


def ours(backend: str) -> Run:
    def run(targets: list[Tensor], sources: list[Tensor]) -> None:
        with moco_fast.use_backend(backend):
            moco_fast.ema_update_(targets, sources, MOMENTUM)

    return run


@torch.no_grad()
def lerp(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


@torch.no_grad()
def mul_add(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1 - MOMENTUM)


@torch.no_grad()
def official(targets: list[Tensor], sources: list[Tensor]) -> None:
    """The loop of the official model: two temporaries per parameter."""
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * MOMENTUM + source.data * (1 - MOMENTUM)


def parameters(size: str, device: torch.device) -> list[Tensor]:
    """Initial parameters of one encoder."""
    torch.manual_seed(0)
    name = size.removesuffix(MLP)
    encoder = getattr(models, name)(**({"num_classes": 128} if size != name else {}))
    if size != name:
        insert_mlp(encoder, "fc")
    return [parameter.detach().to(device) for parameter in encoder.parameters()]


@cache
def case(size: str, device: torch.device = CPU) -> Case:
    """The case of one encoder."""
    sources = parameters(size, device)
    start = [torch.randn_like(source) for source in sources]
    want = MOMENTUM * _flat(start).double() + (1 - MOMENTUM) * _flat(sources).double()

    def errors(run: Run) -> dict[str, float]:
        targets = _copy(start)
        run(targets, sources)
        return {"targets": relative(_flat(targets), want)}

    def peer(run: Run) -> Peer:
        return bind(run, errors, _copy(start), sources, tolerance=5e-7)

    backends, absent = serving("ema_update_", sources)
    runs = {f"{OURS} {backend}": ours(backend) for backend in backends}
    runs |= {LERP: lerp, MUL_ADD: mul_add, OFFICIAL: official}
    peers = {name: peer(run) for name, run in runs.items()}
    count = sum(t.numel() for t in start)
    label = f"{size}, {len(start)} tensors, {count / 1e6:.1f} M parameters"
    return Case("ema_update_", label, peers, 3.0 * count, 12.0 * count, absent)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _copy(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per encoder, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else GPU_SIZES if device.type == "cuda" else SIZES:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES)
def test_ema_update(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
