"""contrast, forward and gradients, fp32, T = 0.2: MoCo v3 and end-to-end.

MoCo v3: two directions of N queries against N frozen keys, C = 256, in one
launch; 4 N^2 C FLOP each, the logits once and their product with the keys once.
End-to-end: one direction with a gradient to the keys too, C = 128; 6 N^2 C FLOP,
of which our second pass repeats the logits. The rows themselves are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import cuda, measure
from bench import info_nce_peers as other
from bench.bench_nt_xent import ways
from bench.case import BY_HAND, OFFICIAL, REFERENCE, Case, Peer, bind, relative, serving
from bench.compiling import compile_later, forget
from moco_fast import reference

TEMPERATURE = 0.2
V3, END_TO_END = "MoCo v3, 2 x", "end-to-end,"
SIZES = {  # kind, N, C
    "cpu": [(V3, 256, 256), (END_TO_END, 256, 128)],
    "cuda": [(V3, 256, 256), (V3, 4096, 256), (END_TO_END, 4096, 128)],
}
QUICK = [(V3, 8, 32), (END_TO_END, 8, 32)]
PEERS = [REFERENCE, other.COMPILED, BY_HAND, OFFICIAL]
CPU = torch.device("cpu")

Loss = Callable[[Tensor, Tensor], Tensor]  # of q and k (D, N, C)
Run = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # loss, gradients to q and, if it has one, k


def one_by_one(cross_entropy: Loss) -> Loss:
    """The loss of MoCo v3 from a mean cross-entropy of normalised q and k (N, C): a direction at a time."""

    def loss_of(q: Tensor, k: Tensor) -> Tensor:
        pairs = zip(F.normalize(q, dim=2), F.normalize(k, dim=2), strict=True)
        return 2 * TEMPERATURE * torch.stack([cross_entropy(*pair) for pair in pairs]).sum()

    return loss_of


def labels(q: Tensor) -> Tensor:
    return torch.arange(len(q), device=q.device)


def of_logits(q: Tensor, k: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("nc,mc->nm", [q, k]) / TEMPERATURE, labels(q))


official = one_by_one(of_logits)


def autocast(q: Tensor, k: Tensor) -> Tensor:
    with torch.autocast(q.device.type, torch.bfloat16):
        return official(q, k)


def inf_cl(q: Tensor, k: Tensor) -> Tensor:
    scaled = q / TEMPERATURE
    return (other.inf_cl_lse(scaled, k) - (scaled * k).sum(dim=1)).mean()


def cut_cross_entropy(q: Tensor, k: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy((q / TEMPERATURE).half(), k.half(), labels(q), filter_eps=None).float()


def liger(q: Tensor, k: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(q / TEMPERATURE, k, labels(q))


def with_gradients(loss_of: Loss) -> Run:
    def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(q, k)
        return loss.detach(), *torch.autograd.grad(loss, [x for x in (q, k) if x.requires_grad])

    return run


@torch.no_grad()
def by_hand(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """One buffer of logits, which becomes their gradient in place; two or three products."""
    q_norm, k_norm = (x.norm(dim=2, keepdim=True).clamp_min_(1e-12) for x in (q, k))
    q_hat, k_hat = q / q_norm, k / k_norm
    logits = torch.bmm(q_hat, k_hat.mT).div_(TEMPERATURE)
    p = logits.sub_(logits.logsumexp(dim=2, keepdim=True)).exp_()
    own = p.diagonal(dim1=1, dim2=2)
    loss = -2 * TEMPERATURE / q.shape[1] * own.log().sum()
    own.sub_(1)
    p.mul_(2 / q.shape[1])
    dq = other.through_norm(torch.bmm(p, k_hat), q_hat, q_norm)
    if not k.requires_grad:
        return loss, dq
    return loss, dq, other.through_norm(torch.bmm(p.mT, q_hat), k_hat, k_norm)


@torch.no_grad()
def attention(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with the keys as values too, both directions as one batch; forward only, to frozen keys."""
    q_hat, norm = reference.normalise(q.reshape(-1, q.shape[2]))
    k_hat, _ = reference.normalise(k.reshape(-1, k.shape[2]))
    mean, lse = other.flash(
        q_hat.view(q.shape)[:, None].half(), k_hat.view(k.shape)[:, None].half(), 1 / TEMPERATURE
    )
    positive = (q_hat * k_hat).sum(dim=1) / TEMPERATURE
    loss = 2 * TEMPERATURE / q.shape[1] * (lse.float().flatten() - positive).sum()
    dq_hat = 2 / q.shape[1] * (mean.float().reshape(q_hat.shape) - k_hat)
    return loss, other.through_norm(dq_hat, q_hat, norm).view(q.shape)


def ours(backend: str, precision: str) -> Run:
    def loss_of(q: Tensor, k: Tensor) -> Tensor:
        with moco_fast.use_backend(backend):
            return 2 * TEMPERATURE * len(q) * moco_fast.contrast(q, k, TEMPERATURE, precision=precision)

    return with_gradients(loss_of)


def on_gpu(frozen: bool) -> dict[str, tuple[Run, dict]]:
    """Peers of a GPU only, with options of :class:`bench.case.Peer`."""
    tf32, half = ({"product": name, "tolerance": 3e-2} for name in ("tf32", "fp16"))
    losses = {
        "Inf-CL": (inf_cl, tf32),
        "cut-cross-entropy, fp16": (cut_cross_entropy, half),
        "Liger fused linear cross-entropy": (liger, tf32),
    }
    return {
        "official formula, TF32": (cuda.in_tf32(with_gradients(official)), tf32),
        # Logits rounded to bf16, as in bench/info_nce_peers.py: here for its speed.
        "official formula, bf16 autocast": (with_gradients(autocast), {"product": "bf16", "tolerance": 0.5}),
        "torch.compile, TF32": (cuda.in_tf32(with_gradients(compiled())), tf32),
        **{name: (with_gradients(one_by_one(loss)), options) for name, (loss, options) in losses.items()},
        **({"flash attention, V = K, fp16": (attention, half)} if frozen else {}),
    }


def compiled() -> Loss:
    return compile_later(official, fullgraph=True, dynamic=False)


@cache
def case(size: tuple[str, int, int], device: torch.device = CPU) -> Case:
    """The case of one size: kind, N and C."""
    kind, n, c = size
    frozen = kind == V3
    directions = 2 if frozen else 1
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, directions, n, c, generator=generator)
    k += q
    q, k = q.to(device).requires_grad_(), k.to(device).requires_grad_(not frozen)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k)]
    wants = with_gradients(official)(*exact)

    def errors(run: Run) -> dict[str, float]:
        names = ("loss", "dq") if frozen else ("loss", "dq", "dk")
        return {name: relative(got, want) for name, got, want in zip(names, run(q, k), wants, strict=True)}

    def peer(run: Run, **options) -> Peer:
        return bind(run, errors, q, k, **options)

    backends, absent = serving("contrast", (q, k))
    peers = ways(backends, ours, peer)
    forget()
    peers[other.COMPILED] = peer(with_gradients(compiled()))
    peers[BY_HAND] = peer(by_hand)
    if device.type == "cuda":
        peers |= {name: peer(run, **options) for name, (run, options) in on_gpu(frozen).items()}
    peers[OFFICIAL] = peer(with_gradients(official))
    flops, tensors = (8.0, 6) if frozen else (6.0, 4)
    return Case("contrast", f"{kind} N={n}, C={c}", peers, flops * n * n * c, 4.0 * tensors * n * c, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=lambda size: size[0].split(",")[0])
def test_contrast(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
