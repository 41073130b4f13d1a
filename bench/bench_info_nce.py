"""info_nce, forward and gradient to q, fp32: K = 65536, C = 128, T = 0.07, several batch sizes.

4 N K C FLOP (two matrix products) and one reading of the queue. Features are
random for the timing; errors are taken on random and on clustered ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import measure
from bench.case import NATIVE, OFFICIAL, OURS, REFERENCE, Case, Peer, bind, relative, without_native
from moco_fast import native, reference

TEMPERATURE = 0.07
SIZES = [(32, 65536, 128), (256, 65536, 128), (1024, 65536, 128)]  # N, K, C
QUICK = [(8, 500, 32)]
NATIVE_BF16, BLOCKED, COMPILED = f"{OURS} native, bf16", "blocked torch.mm", "torch.compile"
PEERS = [NATIVE, NATIVE_BF16, REFERENCE, BLOCKED, COMPILED, OFFICIAL]
BLOCK = 2**20  # logits per block of the blocked peer, 4 MB: 4096 queue rows at N = 256


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # (N, C), raw, requires grad
    k: Tensor  # (N, C), raw
    queue: Tensor  # (K, C), unit rows
    buffer: Tensor  # (C, K), the official layout of the same queue


Run = Callable[[Inputs], tuple[Tensor, Tensor]]  # mean loss, its gradient to q


def make(n: int, k: int, c: int, clustered: bool) -> Inputs:
    """Draw features; clustered ones have four directions only, so that errors add up, not cancel."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, c, generator=generator), dim=1)

    def draw(rows: int) -> Tensor:
        noise = torch.randn(rows, c, generator=generator)
        return centres[torch.randint(4, (rows,), generator=generator)] + 0.05 * noise if clustered else noise

    q = draw(n)
    keys = q + draw(n)
    queue = F.normalize(draw(k), dim=1)
    return Inputs(q.requires_grad_(), keys, queue, queue.t().contiguous())


def official_logits(q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
    """What the forward of the official model does after its encoders: (N, 1 + K) logits, positive first."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, buffer.clone().detach())
    logits = torch.cat([positive, negative], dim=1)
    logits /= TEMPERATURE
    return logits


def official_loss(q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
    """Those logits, and the cross-entropy with label 0 that the training script takes of them."""
    logits = official_logits(q, k, buffer)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def official(x: Inputs) -> tuple[Tensor, Tensor]:
    """The official step: the script holds the logits, for its accuracy, until after the backward."""
    logits = official_logits(x.q, x.k, x.buffer)
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    return loss, *torch.autograd.grad(loss, x.q)


def blocked(x: Inputs) -> tuple[Tensor, Tensor]:
    """The strongest eager version known: never N x K, online softmax in cache, gradient without autograd."""
    q = x.q.detach()
    q_hat, norm = reference.normalise(q)
    k_hat, _ = reference.normalise(x.k)
    positive = (q_hat * k_hat).sum(dim=1, keepdim=True) / TEMPERATURE
    scaled = q_hat / TEMPERATURE
    top, total, weighted = positive, torch.zeros_like(positive), torch.zeros_like(q)
    for rows in x.queue.split(BLOCK // len(q)):
        logits = torch.mm(scaled, rows.t())
        new_top = torch.maximum(top, logits.amax(dim=1, keepdim=True))
        exps = logits.sub_(new_top).exp_()
        shrink = torch.exp(top - new_top)
        total = total * shrink + exps.sum(dim=1, keepdim=True)
        weighted.mul_(shrink).addmm_(exps, rows)
        top = new_top
    everything = total + torch.exp(positive - top)
    loss = (everything.log() + top - positive).mean()
    dq_hat = (weighted - total * k_hat) / (everything * TEMPERATURE * len(q))
    return loss, (dq_hat - q_hat * (q_hat * dq_hat).sum(dim=1, keepdim=True)) / norm


def ours(backend: str, precision: str = "high") -> Run:
    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        with moco_fast.use_backend(backend):
            loss = moco_fast.info_nce(x.q, x.k, x.queue, TEMPERATURE, precision=precision)
            return loss, *torch.autograd.grad(loss, x.q)

    return run


def exact(x: Inputs) -> tuple[Tensor, Tensor]:
    """The official formula in float64, 64 queries at a time to bound its memory."""
    buffer, n = x.buffer.double(), len(x.q)
    losses, dq = [], []
    for q, k in zip(x.q.detach().split(64), x.k.split(64), strict=True):
        q = q.double().requires_grad_()
        loss = official_loss(q, k.double(), buffer) * (len(q) / n)
        dq.append(torch.autograd.grad(loss, q)[0])
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.cat(dq)


def compiled(x: Inputs) -> tuple[Run | None, str]:
    """The official formula compiled for the shapes of ``x``; None and the reason where that fails."""
    loss_of = torch.compile(official_loss, fullgraph=True, dynamic=False)

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        loss = loss_of(x.q, x.k, x.buffer)
        return loss, *torch.autograd.grad(loss, x.q)

    try:
        run(x)
    except Exception as error:  # inductor without a C++ compiler: the type is torch's own and changes
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return run, ""


@cache
def case(size: tuple[int, int, int]) -> Case:
    """The case of one size, N, K and C."""
    n, k, c = size
    sets = {"random": make(*size, clustered=False), "clustered": make(*size, clustered=True)}
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

    absent = without_native()
    peers = {} if absent else {NATIVE: peer(ours("native"))}
    if absent or not native.has_bf16_units():
        absent[NATIVE_BF16] = absent.get(NATIVE, "this CPU has no bf16 units")
    else:
        peers[NATIVE_BF16] = peer(ours("native", "medium"), tolerance=3e-2, product="bf16")
    peers[REFERENCE] = peer(ours("reference"))
    peers[BLOCKED] = peer(blocked)
    run, why = compiled(sets["random"])
    if run is None:
        absent[COMPILED] = why
    else:
        peers[COMPILED] = peer(run)
    peers[OFFICIAL] = peer(official)
    moved = 4.0 * (k * c + 3 * n * c)
    return Case("info_nce", f"N={n}, K={k}, C={c}", peers, 4.0 * n * k * c, moved, absent)


def cases(quick: bool) -> Iterator[Case]:
    """One case per batch size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES:
        yield case.__wrapped__(size)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"N{size[0]}")
def test_info_nce(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
