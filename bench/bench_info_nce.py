"""info_nce, forward and gradient to q, fp32: K = 65536, C = 128, T = 0.07, several batch sizes.

4 N K C FLOP (two matrix products) and one reading of the queue. Features are
random for the timing; errors are taken on random and on clustered ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import compiling, measure
from bench import info_nce_peers as other
from bench.case import NATIVE, OFFICIAL, OURS, PAIRS, REFERENCE, Case, Peer, bind, relative, serving
from bench.info_nce_peers import Inputs, Run
from moco_fast import native

TEMPERATURE = 0.07
SIZES = [(32, 65536, 128), (256, 65536, 128), (1024, 65536, 128)]  # N, K, C
QUICK = [(8, 500, 32)]
NATIVE_BF16 = f"{NATIVE}, bf16"
OF_BF16 = [NATIVE_BF16, other.BLOCKED_BF16, *other.AUTOCAST]
PEERS = [NATIVE, REFERENCE, other.BLOCKED, other.COMPILED, other.LIGHTLY, OFFICIAL, *OF_BF16]
CPU = torch.device("cpu")

# By what the products may round their operands to: options of a peer. Errors on clustered features are about
# 24 times those on random ones, 1.7e-4 in fp16 and 3.4e-4 in bf16, and some more.
PRECISIONS = {
    "highest": {"tolerance": 1e-3, "product": PAIRS},
    "high": {"tolerance": 1e-2, "product": "fp16"},
    "medium": {"tolerance": 3e-2, "product": "bf16"},
}


def make(n: int, k: int, c: int, temperature: float, clustered: bool, device: torch.device) -> Inputs:
    """Draw features; clustered ones have four directions only, so that errors add up, not cancel."""
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same features on every device
    centres = F.normalize(torch.randn(4, c, generator=generator), dim=1)

    def draw(rows: int) -> Tensor:
        noise = torch.randn(rows, c, generator=generator)
        return centres[torch.randint(4, (rows,), generator=generator)] + 0.05 * noise if clustered else noise

    q = draw(n)
    keys = q + draw(n)
    queue = F.normalize(draw(k), dim=1).to(device)
    return Inputs(q.to(device).requires_grad_(), keys.to(device), queue, queue.t().contiguous(), temperature)


def ours(backend: str, precision: str = "high", mirror: bool = False) -> Run:
    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        with moco_fast.use_backend(backend):
            queue = x.mirror if mirror else x.queue
            loss = moco_fast.info_nce(x.q, x.k, queue, x.temperature, precision=precision)
            return loss, *torch.autograd.grad(loss, x.q)

    return run


def exact(x: Inputs) -> tuple[Tensor, Tensor]:
    """The official formula in float64, 64 queries at a time to bound its memory."""
    buffer, n = x.buffer.double(), len(x.q)
    losses, dq = [], []
    for q, k in zip(x.q.detach().split(64), x.k.split(64), strict=True):
        q = q.double().requires_grad_()
        loss = other.official_loss(q, k.double(), buffer, x.temperature) * (len(q) / n)
        dq.append(torch.autograd.grad(loss, q)[0])
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.cat(dq)


@cache
def case(size: tuple[int, int, int], device: torch.device = CPU, temperature: float = TEMPERATURE) -> Case:
    """The case of one size, N, K and C."""
    n, k, c = size
    sets = {kind: make(*size, temperature, kind == "clustered", device) for kind in ("random", "clustered")}
    wants = {kind: exact(x) for kind, x in sets.items()}

    def errors(run: Run) -> dict[str, float]:
        found = {}
        for kind, x in sets.items():
            loss, dq = run(x)
            found[f"loss, {kind}"] = relative(loss.detach(), wants[kind][0])
            found[f"dq, {kind}"] = relative(dq, wants[kind][1])
        return found

    def peer(run: Run, **options) -> Peer:
        return bind(run, errors, sets["random"], **options)

    x = sets["random"]
    moved = 4.0 * (k * c + 3 * n * c)
    half = moved - 2.0 * k * c  # from a queue in fp16
    backends, absent = serving("info_nce", (x.q, x.k, x.queue))
    peers = {}
    for backend in backends:
        if backend == "reference":  # fp32 whatever is asked for
            peers[REFERENCE] = peer(ours(backend))
        elif device.type == "cuda":
            # The native kernel reads a 16-bit queue only.
            for precision, options in PRECISIONS.items() if backend == "triton" else ():
                peers[f"{OURS} {backend}, {precision}"] = peer(ours(backend, precision), **options)
            # What the model runs.
            mirrored = ours(backend, "high", mirror=True)
            peers[f"{OURS} {backend}, high, fp16 mirror"] = peer(mirrored, bytes=half, **PRECISIONS["high"])
        else:  # "high" and "highest" are both fp32 on a CPU
            peers[f"{OURS} {backend}"] = peer(ours(backend))
            if native.has_bf16_units():
                peers[NATIVE_BF16] = peer(ours(backend, "medium"), **PRECISIONS["medium"])
    compiling.forget()
    others = other.everywhere()
    if device.type == "cuda":
        others |= other.on_gpu()
        absent |= other.UNSUITABLE
    elif native.has_bf16_units():
        others |= other.on_bf16_units()
    else:
        why = "this CPU or build has no bf16 matrix units"
        absent |= dict.fromkeys(OF_BF16, why) | {NATIVE_BF16: absent.get(NATIVE, why)}
    peers |= {name: peer(run, **options) for name, (run, options) in others.items()}
    peers[OFFICIAL] = peer(other.official)
    label = f"N={n}, K={k}, C={c}" + ("" if temperature == TEMPERATURE else f", T={temperature:g}")
    return Case("info_nce", label, peers, 4.0 * n * k * c, moved, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per batch size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"N{size[0]}")
def test_info_nce(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
