"""nt_xent of two views, forward and gradient to both, fp32: C = 128, T = 0.1, several batch sizes.

4 C (2N)^2 FLOP: the similarities, and one product of as many with the rows for
the gradient. Our kernels make 6: they compute the similarities again instead of
keeping them. The rows themselves are few.
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
from bench.case import BY_HAND, OFFICIAL, OURS, PAIRS, REFERENCE, Case, Peer, bind, relative, serving
from bench.compiling import compile_later
from bench.info_nce_peers import through_norm

TEMPERATURE = 0.1
SIZES = {"cpu": [(256, 128)], "cuda": [(512, 128), (4096, 128)]}  # N, C
QUICK = [(8, 32)]
COMPILED = "torch.compile"
# By what the products may round their operands to: options of a peer.
PRECISIONS = {
    "highest": {"tolerance": 1e-4, "product": PAIRS},
    "high": {"tolerance": 2e-3, "product": "fp16"},
    "medium": {"tolerance": 2e-2, "product": "bf16"},
}
PEERS = [REFERENCE, COMPILED, BY_HAND, OFFICIAL]
CPU = torch.device("cpu")

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # views (N, C) -> mean loss, gradients (2N, C)


def formula(z1: Tensor, z2: Tensor) -> Tensor:
    """What SimCLR code does: all similarities, the diagonal masked out, cross-entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.t() / TEMPERATURE).fill_diagonal_(float("-inf"))
    n = len(z1)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def with_gradient(
    loss_of: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor
) -> tuple[Tensor, Tensor]:
    loss = loss_of(z1, z2)
    return loss.detach(), torch.cat(torch.autograd.grad(loss, (z1, z2)))


@torch.no_grad()
def by_hand(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """The logits become probabilities in place; two products."""
    z = torch.cat([z1, z2])
    norm = z.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    z_hat = z / norm
    logits = torch.mm(z_hat, z_hat.t()).div_(TEMPERATURE).fill_diagonal_(float("-inf"))
    p = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).exp_()
    own = [p.diagonal(offset) for offset in (len(z1), -len(z1))]
    loss = -sum(probability.log().sum() for probability in own) / len(z)
    for probability in own:
        probability.sub_(1)
    dz_hat = torch.mm(p + p.t(), z_hat).div_(TEMPERATURE * len(z))
    return loss, through_norm(dz_hat, z_hat, norm)


def ours(backend: str, precision: str) -> Run:
    def run(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        with moco_fast.use_backend(backend):
            return with_gradient(
                partial(moco_fast.nt_xent, temperature=TEMPERATURE, precision=precision), z1, z2
            )

    return run


def ways(
    backends: list[str], ours: Callable[[str, str], Callable], peer: Callable[..., Peer]
) -> dict[str, Peer]:
    """Our peers of an op: Triton in every precision, the others in theirs."""
    peers = {}
    for backend in backends:
        if backend == "triton":
            for precision, options in PRECISIONS.items():
                peers[f"{OURS} triton, {precision}"] = peer(ours(backend, precision), **options)
        else:
            peers[f"{OURS} {backend}"] = peer(ours(backend, "highest"))
    return peers


@cache
def case(size: tuple[int, int], device: torch.device = CPU) -> Case:
    """The case of one size, N and C."""
    n, c = size
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, n, c, generator=generator)
    views[1] += views[0]
    z1, z2 = (view.to(device).requires_grad_() for view in views)
    exact = [view.detach().double().requires_grad_() for view in (z1, z2)]
    want_loss, want_dz = with_gradient(formula, *exact)

    def errors(run: Run) -> dict[str, float]:
        loss, dz = run(z1, z2)
        return {"loss": relative(loss, want_loss), "dz": relative(dz, want_dz)}

    def peer(run: Run, **options) -> Peer:
        return bind(run, errors, z1, z2, **options)

    backends, absent = serving("nt_xent", (z1,))
    peers = ways(backends, ours, peer)
    peers[COMPILED] = peer(partial(with_gradient, compile_later(formula)))
    peers[BY_HAND] = peer(by_hand)
    peers[OFFICIAL] = peer(partial(with_gradient, formula))
    return Case("nt_xent", f"2N={2 * n}, C={c}", peers, 4.0 * c * (2 * n) ** 2, 8.0 * 2 * n * c, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=lambda size: f"N{size[0]}")
def test_nt_xent(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
