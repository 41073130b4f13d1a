"""Logits without memory that are written to, kept, or looked at late: as true ones would be."""

import gc
import math

import pytest
import torch
from methods import Net
from test_compat_logits import C, K, both
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moco_fast.compat.builder import MoCo

pytestmark = pytest.mark.filterwarnings("ignore:moco_fast.compat")


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_writes_that_are_not_counted_are_seen():
    (_, logits, labels), (_, true) = both()
    logits.data.mul_(5)
    close(F.cross_entropy(logits, labels), F.cross_entropy(5 * true, labels))
    (_, logits, labels), _ = both()
    logits.detach().numpy()[:] = 0
    assert F.cross_entropy(logits, labels).item() == pytest.approx(math.log(K + 1))
    assert not logits.topk(1)[1].t().eq(labels + 1).any()


def test_topk_is_that_of_the_time_when_it_was_asked_for():
    (q, logits, _), (other, true) = both()
    values, indices = logits.topk(3)
    with torch.no_grad():
        logits.neg_()
    want = true.topk(3)
    close(values.clone(), want.values)
    assert torch.equal(indices.clone(), want.indices)
    values.sum().backward()
    want.values.sum().backward()
    close(q.grad, other.grad)


def test_gradients_can_be_looked_at_after_the_logits_are_gone():
    with torch.autograd.detect_anomaly():
        (q, logits, labels), (other, true) = both()
        loss = F.cross_entropy(logits, labels)
        del logits
        loss.backward()
    F.cross_entropy(true, labels).backward()
    close(q.grad, other.grad)

    (_, logits, labels), (_, true) = both()
    grad = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    del logits
    gc.collect()
    close(grad * 1, torch.autograd.grad(F.cross_entropy(true, labels), true)[0])


def test_detached_ones_can_want_a_gradient():
    (q, logits, labels), (other, true) = both()
    leaf, true_leaf = logits.detach().requires_grad_(), true.detach().requires_grad_()
    F.cross_entropy(leaf, labels).backward()
    F.cross_entropy(true_leaf, labels).backward()
    close(leaf.grad * 1, true_leaf.grad)

    checkpoint(F.cross_entropy, logits, labels, use_reentrant=True).backward()
    F.cross_entropy(true, labels).backward()
    close(q.grad, other.grad)


@pytest.mark.filterwarnings("error")
def test_arguments_by_name_stay_fused():
    (_, logits, labels), (_, true) = both()
    close(F.cross_entropy(input=logits, target=labels), F.cross_entropy(true, labels))
    hits = torch.topk(input=logits, k=2)[1].t().eq(labels)
    assert torch.equal(hits, true.topk(2)[1].t().eq(labels))
    assert logits.nbytes == 4 * logits.numel() and not logits.is_sparse


def test_logits_that_are_kept_hold_the_queue_once():
    model = MoCo(Net, C, K)
    batches = torch.randn(40, 2, 4, 3, 8, 8)
    logits, _ = model(*batches[0])
    want = logits.clone() * 1
    for x, y in batches[1:]:
        model(x, y)
    kept = sum(len(slots) for slots, _ in logits.queue.undo)
    assert K <= kept < K + 4
    close(logits * 1, want)


def test_what_is_not_a_number_is_never_right():
    model = MoCo(Net, C, K)
    with torch.no_grad():
        model.encoder_q.fc.weight.fill_(torch.nan)
    logits, labels = model(*torch.randn(2, 4, 3, 8, 8))
    assert not logits.topk(5)[1].t().eq(labels).any()
