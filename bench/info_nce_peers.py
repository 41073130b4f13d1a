"""Other ways to compute InfoNCE and its gradient: the official formula, its variants, attention, libraries.

All take the same inputs and return the same two tensors. Libraries that offer a
log-sum-exp over the queue or a fused cross-entropy are composed into the op;
one that is not installed or does not run here fails its check, and the report
says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import cuda
from bench.compiling import compile_later
from moco_fast import reference

BLOCKED, COMPILED, LIGHTLY = "blocked torch.mm", "torch.compile", "lightly NTXentLoss"
BLOCKED_BF16 = f"{BLOCKED}, bf16"
BLOCK = 2**20  # logits per block of the blocked peer, 4 MB: 4096 queue rows at N = 256

# Peers that cannot compute this op, whatever the machine.
UNSUITABLE = {
    "scaled_dot_product_attention": "does not return the log-sum-exp; the op behind it is here as attention",
    "Liger, quack fused linear cross-entropy": "one matrix of classes for all rows; here each has a positive",
}


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # (N, C), raw, requires grad
    k: Tensor  # (N, C), raw
    queue: Tensor  # (K, C), unit rows
    buffer: Tensor  # (C, K), the official layout of the same queue
    temperature: float

    @cached_property
    def mirror(self) -> Tensor:
        """The queue in fp16, which ``KeyQueue`` keeps in step with it on a GPU."""
        return self.queue.half()


Run = Callable[[Inputs], tuple[Tensor, Tensor]]  # mean loss, its gradient to q


def official_logits(q: Tensor, k: Tensor, buffer: Tensor, temperature: float) -> Tensor:
    """What the forward of the official model does after its encoders: (N, 1 + K) logits, positive first."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, buffer.clone().detach())
    logits = torch.cat([positive, negative], dim=1)
    logits /= temperature
    return logits


def labels(logits: Tensor) -> Tensor:
    return torch.zeros(len(logits), dtype=torch.long, device=logits.device)


def official_loss(q: Tensor, k: Tensor, buffer: Tensor, temperature: float) -> Tensor:
    """Those logits, and the cross-entropy with label 0 that the training script takes of them."""
    logits = official_logits(q, k, buffer, temperature)
    return F.cross_entropy(logits, labels(logits))


def with_cross_entropy(cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """The official step: the script holds the logits, for its accuracy, until after the backward."""

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        logits = official_logits(x.q, x.k, x.buffer, x.temperature)
        loss = cross_entropy(logits, labels(logits))
        return loss, *torch.autograd.grad(loss, x.q)

    return run


official = with_cross_entropy(F.cross_entropy)


def autocast(x: Inputs) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.q.device.type, torch.bfloat16):
        loss = official_loss(x.q, x.k, x.buffer, x.temperature)
    return loss, *torch.autograd.grad(loss, x.q)


def compiled() -> Run:
    """The official formula compiled for the shapes of its first call."""
    loss_of = compile_later(official_loss, fullgraph=True, dynamic=False)

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        loss = loss_of(x.q, x.k, x.buffer, x.temperature)
        return loss, *torch.autograd.grad(loss, x.q)

    return run


def blocked(x: Inputs) -> tuple[Tensor, Tensor]:
    """The strongest eager version known: never N x K, online softmax in cache, gradient without autograd."""
    q = x.q.detach()
    q_hat, norm = reference.normalise(q)
    k_hat, _ = reference.normalise(x.k)
    positive = (q_hat * k_hat).sum(dim=1, keepdim=True) / x.temperature
    scaled = q_hat / x.temperature
    top, total, weighted = positive, torch.zeros_like(positive), torch.zeros_like(q)
    for rows in x.queue.split(max(1, BLOCK // len(q))):
        logits = torch.mm(scaled, rows.t())
        new_top = torch.maximum(top, logits.amax(dim=1, keepdim=True))
        exps = logits.sub_(new_top).exp_()
        shrink = torch.exp(top - new_top)
        total = total * shrink + exps.sum(dim=1, keepdim=True)
        weighted.mul_(shrink).addmm_(exps, rows)
        top = new_top
    everything = total + torch.exp(positive - top)
    loss = (everything.log() + top - positive).mean()
    dq_hat = (weighted - total * k_hat) / (everything * x.temperature * len(q))
    return loss, through_norm(dq_hat, q_hat, norm)


def through_norm(dq_hat: Tensor, q_hat: Tensor, norm: Tensor) -> Tensor:
    return (dq_hat - q_hat * (q_hat * dq_hat).sum(dim=-1, keepdim=True)) / norm


def attention(attend: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Run:
    """Attention with the queue as keys and as values: ``sum_j p_j n_j`` and the log-sum-exp are all it takes.

    Args:
        attend: of q (1, 1, N, C), queue (1, 1, K, C), 1 / T; returns output (1, 1, N, C), lse (1, 1, N).
    """

    @torch.no_grad()
    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        q_hat, norm = reference.normalise(x.q)
        k_hat, _ = reference.normalise(x.k)
        positive = (q_hat * k_hat).sum(dim=1, keepdim=True) / x.temperature
        mean, lse = attend(q_hat[None, None].half(), x.queue[None, None].half(), 1 / x.temperature)
        lse = lse.float().reshape(-1, 1)
        total = torch.logaddexp(lse, positive)
        dq_hat = torch.exp(lse - total) * (mean[0, 0].float() - k_hat) / (x.temperature * len(q_hat))
        return (total - positive).mean(), through_norm(dq_hat, q_hat, norm)

    return run


def flash(q: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The op behind F.scaled_dot_product_attention, which does return the log-sum-exp."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, queue, queue, scale=scale)[:2]


def flex() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    @cache
    def attend() -> Callable:
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention, fullgraph=True, dynamic=False)

    return lambda q, queue, scale: attend()(q, queue, queue, scale=scale, return_lse=True)


def from_lse(lse_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """The loss from a differentiable log-sum-exp over the queue, (N,), of scaled queries (N, C)."""

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        q, k = F.normalize(x.q, dim=1) / x.temperature, F.normalize(x.k, dim=1)
        positive = (q * k).sum(dim=1)
        loss = (torch.logaddexp(lse_of(q, x.queue), positive) - positive).mean()
        return loss, *torch.autograd.grad(loss, x.q)

    return run


def inf_cl_lse(q: Tensor, queue: Tensor) -> Tensor:
    from inf_cl.flash import FlashProb

    return FlashProb.apply(q[:, None], queue[:, None])


def cut_cross_entropy_lse(q: Tensor, queue: Tensor) -> Tensor:
    """Its loss of class 0 is the log-sum-exp minus the logit of queue row 0, which is added back."""
    from cut_cross_entropy import linear_cross_entropy

    low, rows = q.half(), queue.half()
    losses = linear_cross_entropy(low, rows, labels(q), reduction="none", filter_eps=None)
    return losses.float() + low.float() @ rows[0].float()


def liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target)


def lightly() -> Run:
    @cache
    def loss_of(x: Inputs) -> torch.nn.Module:
        from lightly.loss import NTXentLoss

        module = NTXentLoss(temperature=x.temperature, memory_bank_size=0)
        bank = module.memory_bank
        # The same queue for every call; what replaces its rows is the op enqueue_.
        bank.size, bank.bank, bank._dequeue_and_enqueue = x.queue.shape, x.queue, lambda batch: None
        return module

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        loss = loss_of(x)(x.q, x.k)
        return loss, *torch.autograd.grad(loss, x.q)

    return run


def everywhere() -> dict[str, tuple[Run, dict]]:
    """Peers of any device, by name, with options of :class:`bench.case.Peer`."""
    return {
        BLOCKED: (blocked, {}),
        COMPILED: (compiled(), {}),
        LIGHTLY: (lightly(), {}),
    }


def in_bf16(run: Run) -> Run:
    """The same call on a CPU, with operands of its fp32 matrix products rounded to bf16 by oneDNN."""

    def wrapped(x: Inputs) -> tuple[Tensor, Tensor]:
        settings = torch.backends.mkldnn.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            return run(x)
        finally:
            settings.fp32_precision = before

    return wrapped


# Logits rounded to bf16 are off by up to 0.4 %, of 1/T: 2 % of the gradient on random features, more on
# clustered ones. It is here for its speed; the table shows its error.
AUTOCAST = {"official formula, bf16 autocast": (autocast, {"product": "bf16", "tolerance": 0.5})}


def on_bf16_units() -> dict[str, tuple[Run, dict]]:
    """Peers of a CPU with matrix units for bf16."""
    return {BLOCKED_BF16: (in_bf16(blocked), {"product": "bf16", "tolerance": 3e-2}), **AUTOCAST}


def on_gpu() -> dict[str, tuple[Run, dict]]:
    """Peers of a GPU only."""
    tf32, half = ({"product": name, "tolerance": 3e-2} for name in ("tf32", "fp16"))
    return {
        "official formula, TF32": (cuda.in_tf32(official), tf32),
        **AUTOCAST,
        "torch.compile, TF32": (cuda.in_tf32(compiled()), tf32),
        "flash attention, V = K, fp16": (attention(flash), half),
        "flex_attention, V = K, fp16": (attention(flex()), half),
        "Inf-CL": (from_lse(inf_cl_lse), tf32),
        "cut-cross-entropy, fp16": (from_lse(cut_cross_entropy_lse), half),
        "Liger cross-entropy of the logits": (with_cross_entropy(liger), {}),
        "quack cross-entropy of the logits": (with_cross_entropy(quack), {}),
    }
