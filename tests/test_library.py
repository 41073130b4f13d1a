"""How ops are registered: what autograd and the dispatcher do around a kernel."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moco_fast


class Watched(TorchDispatchMode):
    """Writes down the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is zero, unwritten."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def rows():
    return torch.randn(4, 8, requires_grad=True)


def info_nce(q):
    return moco_fast.info_nce(q, torch.randn(4, 8), torch.randn(5, 8), return_stats=True)[0]


def dino(q):
    return moco_fast.dino(q, torch.randn(4, 8), torch.randn(5, 8), torch.randn(5, 8), torch.zeros(5))


def contrast(q):
    return moco_fast.contrast(q, rows())


def nt_xent(q):
    return moco_fast.nt_xent(q, q.roll(1, 0))


def split_batch_norm(q):
    return moco_fast.split_batch_norm(q, None, None, 2)[0].mean()


losses = pytest.mark.parametrize("loss_of", [info_nce, dino, contrast, nt_xent, split_batch_norm])


@losses
def test_autograd_writes_no_zeros_for_results_that_nobody_used(loss_of):
    """They are as large as the gradients."""
    loss = loss_of(rows())
    with Watched() as watched:
        loss.backward()
    assert watched.names and not [name for name in watched.names if "zero" in name]


@losses
def test_no_gradient_in_none_out(loss_of):
    q = rows()
    assert torch.autograd.grad(NoGradient.apply(loss_of(q)), q, allow_unused=True) == (None,)


def test_what_is_told_beside_a_result_has_no_gradient():
    q = rows()
    _, stats = moco_fast.info_nce(q, q.detach(), q.detach(), return_stats=True)
    _, mean, var = moco_fast.split_batch_norm(q, None, None, 2)
    assert not any(x.requires_grad for x in (*stats, mean, var))


def test_autograd_sees_what_an_op_writes():
    """A gradient that needs the old values raises."""
    ptr, target, scale = torch.zeros(1, dtype=torch.int64), torch.randn(8), torch.ones(8, requires_grad=True)
    queue, mirrored, mirror = (torch.randn(5, 8) for _ in range(3))
    master = target.clone()
    losses = [(scale * x).sum() for x in (queue, mirrored, mirror, target, master)]
    moco_fast.enqueue_(queue, ptr, torch.randn(2, 8))
    moco_fast.enqueue_(mirrored, ptr, torch.randn(2, 8), mirror)
    moco_fast.ema_update_([target], [torch.randn(8)], 0.9, masters=[master])
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
