"""dino, forward and gradients to student and prototypes, fp32: C = 256, P = 65536, T = 0.1 and 0.04.

8 N P C FLOP: the logits of both models, and two products of as many for the
student's gradients. Our Triton kernels make 14, the reference 12: they compute
logits again instead of keeping them. Bytes: both sets of prototypes in, the
gradient to one out; the rows are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moco_fast
from bench import cuda, measure
from bench.bench_nt_xent import COMPILED, ways
from bench.case import BY_HAND, OFFICIAL, REFERENCE, Case, Peer, bind, relative, serving
from bench.compiling import compile_later, forget
from bench.info_nce_peers import through_norm

STUDENT, TEACHER = 0.1, 0.04  # temperatures
SIZES = {  # N, P, C
    "cpu": [(64, 65536, 256)],
    "cuda": [(64, 65536, 256), (512, 65536, 256), (2048, 65536, 256)],
}
QUICK = [(8, 512, 32)]
PEERS = [REFERENCE, COMPILED, BY_HAND, OFFICIAL]
CPU = torch.device("cpu")

Loss = Callable[..., Tensor]  # of student, teacher (N, C), prototypes, teacher's (P, C) and center (P,)
Run = Callable[..., tuple[Tensor, ...]]  # the same -> loss, gradients to student and prototypes


def official(
    student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> Tensor:
    """Algorithm 1: the logits of both models, a softmax of one and a log-softmax of the other."""
    with torch.no_grad():
        t = (F.linear(F.normalize(teacher, dim=1), teacher_prototypes) - center) / TEACHER
        wanted = F.softmax(t, dim=1)
    s = F.linear(F.normalize(student, dim=1), prototypes) / STUDENT
    return -(wanted * F.log_softmax(s, dim=1)).sum(dim=1).mean()


def autocast(*inputs: Tensor) -> Tensor:
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return official(*inputs)


def with_gradients(loss_of: Loss) -> Run:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])

    return run


@torch.no_grad()
def by_hand(
    student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> tuple[Tensor, ...]:
    """The student's logits become their gradient in place; four products."""
    norm = student.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    s_hat, t_hat = student / norm, F.normalize(teacher, dim=1)
    wanted = torch.mm(t_hat / TEACHER, teacher_prototypes.t()).sub_(center / TEACHER).softmax(dim=1)
    logits = torch.mm(s_hat / STUDENT, prototypes.t())
    log_sum = logits.logsumexp(dim=1, keepdim=True)
    loss = (log_sum.squeeze(1) - (wanted * logits).sum(dim=1)).mean()
    gradient = logits.sub_(log_sum).exp_().sub_(wanted).div_(len(student) * STUDENT)
    return loss, through_norm(torch.mm(gradient, prototypes), s_hat, norm), torch.mm(gradient.t(), s_hat)


def ours(backend: str, precision: str) -> Run:
    def loss_of(*inputs: Tensor) -> Tensor:
        with moco_fast.use_backend(backend):
            return moco_fast.dino(*inputs, STUDENT, TEACHER, precision=precision)

    return with_gradients(loss_of)


def on_gpu() -> dict[str, tuple[Run, dict]]:
    """Peers of a GPU only, with options of :class:`bench.case.Peer`."""
    tf32 = {"product": "tf32", "tolerance": 3e-2}
    return {
        "official formula, TF32": (cuda.in_tf32(with_gradients(official)), tf32),
        # Logits rounded to bf16, as DINO is trained: here for its speed.
        "official formula, bf16 autocast": (with_gradients(autocast), {"product": "bf16", "tolerance": 0.5}),
        "torch.compile, TF32": (cuda.in_tf32(with_gradients(compiled(official))), tf32),
        "torch.compile, bf16 autocast": (
            with_gradients(compiled(autocast)),
            {"product": "bf16", "tolerance": 0.5},
        ),
    }


compiled = partial(compile_later, fullgraph=True, dynamic=False)


@cache
def case(size: tuple[int, int, int], device: torch.device = CPU) -> Case:
    """The case of one size: N, P and C."""
    n, p, c = size
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, n, c, generator=generator)
    w, v = F.normalize(torch.randn(2, p, c, generator=generator), dim=2)
    center = 0.1 * torch.randn(p, generator=generator)
    inputs = [x.to(device) for x in (student, student + noise, w, F.normalize(w + v, dim=1), center)]
    for x in (inputs[0], inputs[2]):
        x.requires_grad_()
    wants = with_gradients(official)(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))

    def errors(run: Run) -> dict[str, float]:
        found = zip(("loss", "ds", "dw"), run(*inputs), wants, strict=True)
        return {name: relative(got, want) for name, got, want in found}

    def peer(run: Run, **options) -> Peer:
        return bind(run, errors, *inputs, **options)

    backends, absent = serving("dino", inputs)
    peers = ways(backends, ours, peer)
    forget()
    peers[COMPILED] = peer(with_gradients(compiled(official)))
    peers[BY_HAND] = peer(by_hand)
    if device.type == "cuda":
        peers |= {name: peer(run, **options) for name, (run, options) in on_gpu().items()}
    peers[OFFICIAL] = peer(with_gradients(official))
    return Case("dino", f"N={n}, P={p}, C={c}", peers, 8.0 * n * p * c, 12.0 * p * c, absent)


def cases(quick: bool, device: torch.device) -> Iterator[Case]:
    """One case per size, made when asked for and freed by whoever drops it."""
    for size in QUICK if quick else SIZES[device.type]:
        yield case.__wrapped__(size, device)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size", SIZES["cpu"], ids=lambda size: f"N{size[0]}")
def test_dino(benchmark, size, name):
    measure.use_threads()
    measure.time_with_pytest(benchmark, case(size), name)
