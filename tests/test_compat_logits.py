"""Logits without memory: fused where cross-entropy and topk ask, true ones for everything else."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from largest import Largest
from torch import nn
from torch.nn import functional as F

import moco_fast
from moco_fast import KeyQueue
from moco_fast.compat import lazy
from moco_fast.compat.logits import Logits, SoftmaxGrad, fused_logits
from moco_fast.compat.source import QueueSnapshot
from moco_fast.models.moco import contrast_logits

N, C, K, T = 12, 8, 50, 0.2

silent = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _first_note(monkeypatch):
    monkeypatch.setattr(lazy, "_noted", False)


def both(dtype=torch.float32, grad=True):
    """Queries, logits and labels, fused; queries and logits, true; of the same numbers."""
    queue = KeyQueue(C, K)
    k = torch.randn(N, C)
    q = (k + 1.5 * torch.randn(N, C)).to(dtype).requires_grad_(grad)
    loss, stats = moco_fast.info_nce(q, k.to(dtype), queue.rows, T, reduction="none", return_stats=True)
    logits, labels = fused_logits(loss, stats.rank, q, k.to(dtype), QueueSnapshot(queue.rows), T)
    other = q.detach().clone().requires_grad_(grad)
    return (q, logits, labels), (other, contrast_logits(other, k.to(dtype), queue.rows.clone(), T))


def accuracy(output, target, topk=(1, 5)):
    """The official function, call by call."""
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1, True, True)
        pred = pred.t()
        correct = pred.eq(target.view(1, -1).expand_as(pred))
        return [correct[:k].view(-1).float().sum(0, keepdim=True).mul_(100.0 / len(target)) for k in topk]


def true_accuracy(logits, topk=(1, 5)):
    rank = (logits[:, 1:] > logits[:, :1]).sum(1)
    return [(rank < k).float().mean() * 100 for k in topk]


@silent
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "same",
    [lambda x: x, torch.Tensor.float, torch.clone, lambda x: x.to("cpu"), lambda x: x.half().float()],
    ids=["itself", "float", "clone", "to", "half and back"],
)
def test_cross_entropy_is_the_fused_loss(same, reduction):
    (q, logits, labels), (other, true) = both()
    with Largest() as largest:
        got = F.cross_entropy(same(logits), labels, reduction=reduction)
        (got * torch.arange(1, 1 + got.numel())).sum().backward()
    assert largest.elements < N * K
    want = F.cross_entropy(true, labels, reduction=reduction)
    (want * torch.arange(1, 1 + want.numel())).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(q.grad, other.grad)


@silent
def test_accuracy_as_upstream_writes_it():
    for _ in range(5):
        (_, logits, labels), (_, true) = both()
        with Largest() as largest:
            got = accuracy(logits, labels), accuracy(logits.detach(), labels, topk=(1, 2, 3))
        assert largest.elements < N * K
        for found, ks in zip(got, ((1, 5), (1, 2, 3)), strict=True):
            torch.testing.assert_close(torch.cat(found), torch.stack(true_accuracy(true, ks)))


@silent
def test_shape_and_dtype_are_those_of_logits():
    (_, logits, labels), (_, true) = both()
    assert isinstance(logits, Logits) and isinstance(logits, torch.Tensor)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout", "is_cuda"):
        assert getattr(logits, name) == getattr(true, name), name
    assert logits.size(1) == 1 + K and logits.stride() == true.stride() and len(logits) == N
    assert labels.dtype == torch.int64 and not labels.any()
    detached = logits.detach()
    assert isinstance(detached, Logits) and not detached.requires_grad
    assert logits.float() is logits and logits.bfloat16().dtype == torch.bfloat16
    assert F.cross_entropy(logits.double(), labels).dtype == torch.float64


OPERATIONS = {
    "label smoothing": lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1),
    "weight": lambda x, t: F.cross_entropy(x, t, weight=torch.linspace(0.5, 2, 1 + K)),
    "other labels": lambda x, t: F.cross_entropy(x, t + 1),
    "own zeros": lambda x, t: F.cross_entropy(x, torch.zeros(N, dtype=torch.long)),
    "probabilities": lambda x, t: F.cross_entropy(x, torch.full((N, 1 + K), 1 / (1 + K))),
    "ignored": lambda x, t: F.cross_entropy(x, t, ignore_index=0, reduction="sum") + x.sum() * 0,
    "sum of squares": lambda x, t: (x**2).mean(),
    "softmax": lambda x, t: torch.softmax(x, dim=1)[:, 0].sum(),
    "slice": lambda x, t: F.cross_entropy(x[:5], t[:5]),
    "concatenation": lambda x, t: torch.cat([x, x]).logsumexp(1).mean(),
    "other device's type": lambda x, t: x.to(torch.float64).exp().sum(),
    "log-softmax": lambda x, t: F.nll_loss(nn.LogSoftmax(dim=1)(x), t),
    "fused and true": lambda x, t: 2 * F.cross_entropy(x, t) + F.cross_entropy(x, t) + (x * x).mean(),
    "values of topk": lambda x, t: x.topk(5, 1, True, True)[0].sum(),
    "smallest": lambda x, t: x.topk(2, 1, largest=False).values.mean(),
    "written to": lambda x, t: F.cross_entropy(x.mul_(0.5), t) + F.cross_entropy(x, t),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_everything_else_gets_true_logits(name):
    (q, logits, labels), (other, true) = both()
    want = OPERATIONS[name](true, torch.zeros(N, dtype=torch.long))
    with pytest.warns(UserWarning, match=r"needs the true logits, \(N, 1 \+ K\)") as noted:
        got = OPERATIONS[name](logits, labels)
    assert len(noted) == 1
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    torch.testing.assert_close(q.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_note_names_operation_and_place():
    (_, logits, _), _ = both()
    with pytest.warns(UserWarning, match="^moco_fast.compat: softmax needs") as noted:
        logits.softmax(1)
    assert noted[0].filename == __file__
    once = logits.dense()
    assert logits.dense() is once


@pytest.mark.filterwarnings("ignore:moco_fast.compat")
def test_looking_at_them():
    (_, logits, _), (_, true) = both()
    assert repr(logits).splitlines()[:3] == repr(true).splitlines()[:3] and f"{logits[0, 0]:.3f}"
    torch.testing.assert_close(torch.tensor(logits.tolist()), true.detach())
    torch.testing.assert_close(torch.from_numpy(logits.detach().numpy()), true.detach())
    values, indices = logits.topk(5, 1, True, True)
    torch.testing.assert_close(values, true.topk(5, 1)[0])
    assert torch.equal(indices + 0, true.topk(5, 1)[1]) and indices.stride() == (1, N)
    assert values.requires_grad and torch.equal(true.topk(5, 1)[1].T, indices.T + 0)
    assert torch.equal(indices == 3, true.topk(5, 1)[1] == 3)
    assert torch.equal(logits.argmax(1), true.argmax(1))
    with pytest.raises(RuntimeError, match="out of range"):
        logits.topk(K + 2, 1)


@pytest.mark.filterwarnings("ignore:moco_fast.compat")
def test_pickling_gives_plain_tensors():
    (_, logits, _), (_, true) = both()
    file = io.BytesIO()
    torch.save({"logits": logits.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["logits"]
    for found in (saved, pickle.loads(pickle.dumps(logits.detach())), copy.deepcopy(logits.detach())):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, true.detach())


def test_labels_that_were_written_to_are_not_trusted():
    (_, logits, labels), (_, true) = both()
    labels[0] = 4
    with pytest.warns(UserWarning, match="cross_entropy needs"):
        loss = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(true, labels))


@silent
def test_views_of_the_labels_are_trusted():
    (_, logits, labels), (_, true) = both()
    for target in (labels.view(-1), labels.detach(), labels.to("cpu"), labels.long()):
        torch.testing.assert_close(F.cross_entropy(logits, target), F.cross_entropy(true, labels))


def test_gradient_to_the_logits():
    """Hooks, retain_grad and autograd.grad see the gradient that the true logits would get."""
    (q, logits, labels), (_, true) = both()
    true.retain_grad()
    F.cross_entropy(true, labels).backward()
    logits.retain_grad()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad * 1))
    loss = F.cross_entropy(logits, labels)
    with pytest.warns(UserWarning, match="needs the true logits"):
        loss.backward(retain_graph=True)
    assert isinstance(logits.grad, SoftmaxGrad) and logits.grad.shape == logits.shape
    torch.testing.assert_close(logits.grad + 0, true.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[0], true.grad, rtol=1e-4, atol=1e-7)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found + 0, true.grad, rtol=1e-4, atol=1e-7)
    (to_q,) = torch.autograd.grad(logits, q, true.grad, retain_graph=True)
    torch.testing.assert_close(to_q, q.grad, rtol=1e-4, atol=1e-7)
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@silent
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    (q, logits, labels), (other, true) = both(dtype)
    assert logits.dtype == true.dtype == dtype
    got, want = F.cross_entropy(logits, labels), F.cross_entropy(true.double(), labels)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(got.double(), want, **tolerance)
    got.backward()
    want.backward()
    torch.testing.assert_close(q.grad, other.grad, **tolerance)


@silent
def test_without_gradient():
    (_, logits, labels), (_, true) = both(grad=False)
    assert not logits.requires_grad and logits.grad_fn is None
    torch.testing.assert_close(F.cross_entropy(logits, labels), F.cross_entropy(true, labels))


def test_accuracy_of_the_scripts_is_this_one():
    """What is tested here is what they call."""
    text = (Path(__file__).parent / "scripts" / "common.py").read_text()
    for call in ("output.topk(max(topk), 1, True, True)", "pred.eq(target.view(1, -1).expand_as(pred))"):
        assert call in text
