"""The methods that MoCo is measured against, as their papers write them: plain PyTorch, explicit logits.

What the models of moco_fast have to equal. They have the names of those models' parameters and buffers, so
that a state dict goes from one to the other; any floating dtype; one process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.eager_moco import EagerMoCo


def with_mlp(encoder: nn.Module) -> nn.Module:
    """The projection MLP of SimCLR and MoCo v2 in the place of ``fc``."""
    width = encoder.fc.in_features
    encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return encoder


class EagerSimCLR(nn.Module):
    """Chen et al. 2020, algorithm 1."""

    def __init__(self, base_encoder, dim, T):
        super().__init__()
        self.T = T
        self.encoder = with_mlp(base_encoder(num_classes=dim))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z = F.normalize(self.encoder(torch.cat([x1, x2])), dim=1)
        n = len(x1)
        similarity = (z @ z.t() / self.T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        other = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
        return F.cross_entropy(similarity, other)


class EagerSimSiam(nn.Module):
    """Chen and He 2021, section 3."""

    def __init__(self, base_encoder, dim, pred_dim, stop_gradient=True):
        super().__init__()
        self.stop_gradient = stop_gradient
        self.encoder = base_encoder(num_classes=dim)
        width = self.encoder.fc.in_features
        self.encoder.fc = nn.Sequential(
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(),
            nn.Linear(pred_dim, dim),
        )  # fmt: skip

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()

        def distance(p: Tensor, z: Tensor) -> Tensor:
            return -(p / p.norm(dim=1, keepdim=True) * (z / z.norm(dim=1, keepdim=True))).sum(1).mean()

        return distance(p1, z2) / 2 + distance(p2, z1) / 2


class EagerEndToEnd(nn.Module):
    """He et al. 2020, figure 2a, with one encoder for both."""

    def __init__(self, base_encoder, dim, T, mlp):
        super().__init__()
        self.T = T
        self.encoder = base_encoder(num_classes=dim)
        if mlp:
            with_mlp(self.encoder)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q, k = F.normalize(self.encoder(x1), dim=1), F.normalize(self.encoder(x2), dim=1)
        return F.cross_entropy(q @ k.t() / self.T, torch.arange(len(q)))


class EagerSymmetricMoCo(EagerMoCo):
    """Each view is a query against the keys of the other; one update of the keys' encoder, one enqueue."""

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        with torch.no_grad():
            self.update_key_encoder()
        loss, keys = 0, []
        for a, b in ((im_q, im_k), (im_k, im_q)):
            q = F.normalize(self.encoder_q(a), dim=1)
            with torch.no_grad():
                k = F.normalize(self.encoder_k(b), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1) / self.T
            loss = loss + F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
            keys.insert(0, k)
        self.enqueue_(torch.cat(keys))  # those of the first view first
        return loss


class EagerMemoryBank(nn.Module):
    """Wu et al. 2018, with their loss or InfoNCE; the negatives are drawn once a step."""

    def __init__(self, base_encoder, count, dim, K, T, momentum, loss):
        super().__init__()
        self.K, self.T, self.momentum, self.loss = K, T, momentum, loss
        self.encoder = base_encoder(num_classes=dim)
        self.register_buffer("bank", F.normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("Z", torch.zeros((), dtype=torch.float64))

    def forward(self, im: Tensor, indices: Tensor) -> Tensor:
        f = F.normalize(self.encoder(im), dim=1)
        drawn = self.bank[torch.randint(len(self.bank), (self.K,))]
        own = self.bank[indices]
        positive, negative = (own * f).sum(1) / self.T, f @ drawn.t() / self.T
        if self.loss == "info_nce":
            loss = -torch.log(positive.exp() / (positive.exp() + negative.exp().sum(1))).mean()
        else:
            if self.Z == 0:
                self.Z.fill_(len(self.bank) * negative.detach().exp().mean())
            noise = self.K / len(self.bank)
            h, others = (x.exp() / self.Z / (x.exp() / self.Z + noise) for x in (positive, negative))
            loss = (-h.log() - (1 - others).log().sum(1)).mean()
        with torch.no_grad():
            new = F.normalize(self.momentum * own + (1 - self.momentum) * f, dim=1)
            for row, value in zip(indices.tolist(), new, strict=True):
                self.bank[row] = value
        return loss


class EagerSupMoCo(EagerMoCo):
    """Khosla et al. 2020, equation 2, over a query's own key and MoCo's queue."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("queue_labels", torch.full((self.K,), -1))

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            k = F.normalize(self.encoder_k(im_k), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], dim=1) / self.T
        same = (labels[:, None] == self.queue_labels) & (labels[:, None] >= 0)
        positive = torch.cat([torch.ones_like(same[:, :1]), same], dim=1)
        log_p = logits - logits.logsumexp(1, keepdim=True)
        slots = (int(self.queue_ptr) + torch.arange(len(k))) % self.K
        self.enqueue_(k)
        self.queue_labels[slots] = labels
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()


class EagerDINO(nn.Module):
    """Caron et al. 2021, algorithm 1, with the logits of both models."""

    def __init__(self, base_encoder, dim, prototypes, mlp_dim, student_T, teacher_T, center_momentum):
        super().__init__()
        self.student_T, self.teacher_T, self.center_momentum = student_T, teacher_T, center_momentum
        self.student, self.teacher = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        for encoder in (self.student, self.teacher):
            encoder.fc = nn.Sequential(
                nn.Linear(encoder.fc.in_features, mlp_dim), nn.GELU(),
                nn.Linear(mlp_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim),
            )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))
        self.teacher_prototypes = nn.Parameter(torch.randn(prototypes, dim), requires_grad=False)
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for target, source in [*pairs, (self.teacher_prototypes, self.prototypes)]:
                target.mul_(m).add_(source, alpha=1 - m)
        images = torch.cat([x1, x2])

        def logits(encoder: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
            return (F.normalize(encoder(images), dim=1) @ F.normalize(weight, dim=1).t()).chunk(2)

        s1, s2 = logits(self.student, self.prototypes)
        with torch.no_grad():
            t1, t2 = logits(self.teacher, self.teacher_prototypes)

        def cross_entropy(t: Tensor, s: Tensor) -> Tensor:
            p = F.softmax((t - self.center) / self.teacher_T, dim=1)
            return -(p * F.log_softmax(s / self.student_T, dim=1)).sum(1).mean()

        loss = (cross_entropy(t1, s2) + cross_entropy(t2, s1)) / 2
        mean = torch.cat([t1, t2]).mean(0)
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        return loss
