"""A MoCo v1/v2 with the official semantics, written out in plain PyTorch: what moco_fast.MoCo has to equal.

Formulas and order of He et al. 2020, algorithm 1, on one device or several. The tests
compare with it, the benchmark of the step times it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class EagerMoCo(nn.Module):
    """Constructor, call and outputs of the official class."""

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False):
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            width = self.encoder_q.fc.in_features
            for encoder in (self.encoder_q, self.encoder_k):
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            k = F.normalize(self.encoder_k(im_k), dim=1)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1)
        logits /= self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        self.enqueue_(k)
        return logits, labels

    def update_key_encoder(self) -> None:
        for p, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data = k.data * self.m + p.data * (1.0 - self.m)

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Reads the pointer back, as the official class does; a batch may pass the end, unlike there."""
        start = int(self.queue_ptr)
        before_the_end = keys[: self.K - start]
        self.queue[:, start : start + len(before_the_end)] = before_the_end.t()
        if rest := len(keys) - len(before_the_end):
            self.queue[:, :rest] = keys[-rest:].t()
        self.queue_ptr[0] = (start + len(keys)) % self.K


class EagerDistributedMoCo(EagerMoCo):
    """The official shuffle over ranks: all images and all keys are gathered on every rank, keys twice.

    Its queue is an ordinary buffer, which DistributedDataParallel broadcasts before every forward.
    """

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            own = slice(dist.get_rank() * len(im_k), (dist.get_rank() + 1) * len(im_k))
            images = gathered(im_k)
            order = self.permutation(len(images)).to(im_k.device)
            dist.broadcast(order, src=0)
            shuffled = F.normalize(self.encoder_k(images[order[own]]), dim=1)
            k = gathered(shuffled)[order.argsort()[own]]
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1)
        logits /= self.T
        labels = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        self.enqueue_(gathered(k))
        return logits, labels

    def permutation(self, batch: int) -> Tensor:
        """The order of all ranks' images; rank 0's is used."""
        return torch.randperm(batch)


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
