"""Linear classifiers trained side by side, each with its own learning rate.

    loss_l = mean over the batch of cross_entropy(W_l x + b_l, y)

All heads are rows of one (L * C, F + 1) matrix, whose last column is the bias: a step of all of them is two
matrix products, with the gradient (softmax - one-hot) x^T / B written out.

Tests: tests/test_linear.py, against autograd and torch.optim.SGD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moco_fast.evaluate.knn import TOP


class Heads:
    """Linear classifiers that are trained side by side, each with its own learning rate.

    All start from one drawing of N(0, 0.01^2) weights and zero biases, as in MoCo's evaluation.

    Args:
        features: F, per image.
        classes: C.
        lr: learning rates.
        weight_decay: L2 penalty.
        momentum: of SGD.
        seed: of the weights.
        like: a tensor of the dtype and on the device to compute in.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        lr: Sequence[float],
        *,
        weight_decay: float,
        momentum: float,
        seed: int,
        like: Tensor,
    ) -> None:
        drawn = torch.randn(classes, features, generator=torch.Generator().manual_seed(seed)) * 0.01
        one = torch.cat([drawn, torch.zeros(classes, 1)], 1).to(like)
        self.classes, self.count = classes, len(lr)
        self.weight = one.repeat(len(lr), 1)  # (L * C, F + 1)
        self._velocity = torch.zeros_like(self.weight)
        self._lr = torch.tensor(lr, dtype=torch.float64).to(like).repeat_interleave(classes)[:, None]
        self._weight_decay, self._momentum = weight_decay, momentum
        self._logits, self._p = like.new_empty(0), like.new_empty(0)

    def logits(
        self,
        x: Tensor,  # (B, F + 1), ones last
    ) -> Tensor:
        """(L, C, B)."""
        return (self.weight @ x.t()).view(self.count, self.classes, len(x))

    def gradient(
        self,
        x: Tensor,  # (B, F + 1), ones last
        labels: Tensor,  # (B,)
        share: Tensor,  # (G, B), weight of every image in the losses of a group of L / G heads
    ) -> Tensor:
        """d(sum over B of share * cross entropy) / d(logits), (L * C, B): ``share * (softmax - one-hot)``.

        Valid until the next call.
        """
        rows = self.count * self.classes
        if self._p.shape[-1] != len(x):  # else the memory of the last batch serves again
            self._logits = x.new_empty(rows, len(x))
            self._p = x.new_empty(self.count, self.classes, len(x))
        torch.mm(self.weight, x.t(), out=self._logits)
        # Images last: a softmax over ten neighbours in memory is several times slower.
        torch.softmax(self._logits.view_as(self._p), 1, out=self._p)
        index = labels.expand(self.count, 1, -1)
        self._p.scatter_add_(1, index, self._p.new_full((), -1).expand(self.count, 1, len(x)))
        self._p.view(len(share), -1, len(x)).mul_(share[:, None])
        return self._p.view(rows, len(x))

    def step(self, x: Tensor, labels: Tensor, share: Tensor, factor: float) -> None:
        """One step of SGD with ``factor`` times the learning rates; arguments as for :meth:`gradient`."""
        gradient = self.gradient(x, labels, share)
        torch.addmm(self._velocity, gradient, x, beta=self._momentum, out=self._velocity)
        if self._weight_decay:
            self._velocity.add_(self.weight, alpha=self._weight_decay)
        self.weight.addcmul_(self._velocity, self._lr, value=-factor)

    def top(
        self,
        x: Tensor,  # (M, F + 1), ones last
    ) -> Tensor:
        """The classes with the highest logits, (L, M, 5); all of them, if they are fewer."""
        best = min(TOP, self.classes)
        return torch.cat([self.logits(part).topk(best, 1).indices for part in x.split(4096)], 2).mT
