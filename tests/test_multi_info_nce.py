"""multi_info_nce against the formula of supervised contrast in float64, and without an N x K tensor."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moco_fast
from moco_fast import native

OP = "info_nce"


def plain(q, k, queue, temperature, labels=None, queue_labels=None):
    """Khosla et al. 2020, equation 2, with all logits, in float64; k is (N, P, C)."""
    q, k = (F.normalize(x.double(), dim=-1) for x in (q, k))
    own = torch.einsum("nc,npc->np", q, k)
    logits = torch.cat([own, q @ queue.double().t()], dim=1) / temperature
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[:, : k.shape[1]] = True
    if labels is not None:
        positive[:, k.shape[1] :] = (labels[:, None] == queue_labels) & (labels[:, None] >= 0)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    return -(log_p * positive).sum(1) / positive.sum(1)


def inputs(n=37, p=1, K=131, c=19, classes=5, clustered=False, seed=0):
    torch.manual_seed(seed)
    centres = torch.randn(classes, c) if clustered else torch.zeros(classes, c)
    labels, queue_labels = torch.randint(-1, classes, (n,)), torch.randint(-1, classes, (K,))
    spread = 0.2 if clustered else 1.0
    q = centres[labels] + spread * torch.randn(n, c)
    k = q[:, None] + 0.3 * spread * torch.randn(n, p, c)
    queue = F.normalize(centres[queue_labels] + spread * torch.randn(K, c), dim=1)
    return q, k, queue, {"labels": labels, "queue_labels": queue_labels}


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("p", [1, 3])
def test_formula(p, labelled, dtype, clustered):
    q, k, queue, labels = inputs(p=p, clustered=clustered)
    labels = labels if labelled else {}
    exact = q.double().requires_grad_()
    want = plain(exact, k, queue, 0.1, **labels)
    want.mean().backward()
    q = q.to(dtype).requires_grad_()
    options = labels | ({"classes": 5} if labelled else {})
    got = moco_fast.multi_info_nce(q, k.to(dtype), queue.to(dtype), 0.1, reduction="none", **options)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert got.dtype == dtype
    got.mean().backward()
    error = (q.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < (2e-5 if dtype == torch.float32 else 1e-6), error
    for reduction in ("mean", "sum"):
        again = moco_fast.multi_info_nce(
            q.detach(), k.to(dtype), queue.to(dtype), 0.1, reduction=reduction, **options
        )
        torch.testing.assert_close(again, getattr(got.detach(), reduction)(), rtol=1e-6, atol=0)


def test_one_key_without_labels_is_info_nce():
    q, k, queue, _ = inputs()
    for keys in (k, k[:, 0]):
        found = []
        for op in (moco_fast.multi_info_nce, moco_fast.info_nce):
            x = q.clone().requires_grad_()
            loss = op(x, keys if op is moco_fast.multi_info_nce else k[:, 0], queue, 0.05)
            loss.backward()
            found.append((loss, x.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_easy_examples_keep_their_digits_beside_labels():
    """Queries whose class is nowhere in the queue, at a loss near 0: exactly info_nce."""
    q, _, queue, labels = inputs()
    k = q + 1e-3
    labels["labels"].fill_(4)
    labels["queue_labels"].clamp_(max=3)
    found = []
    for options in (labels | {"classes": 5}, {}):
        x = q.clone().requires_grad_()
        loss = moco_fast.multi_info_nce(x, k, queue, 0.02, **options)
        loss.backward()
        found.append((loss.detach(), x.grad))
    (loss, grad), (want, want_grad) = found
    assert 0 < want < 1e-3
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-12)


def test_no_tensor_of_n_by_k():
    """On the native backend, whose kernels hold no logits."""
    if native.unavailable():
        pytest.skip("native kernels are not built")
    q, k, queue, labels = inputs(n=64, p=2, K=512, c=16)
    q.requires_grad_()

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, torch.Tensor):
                    Sizes.largest = max(Sizes.largest, x.numel())
            return result

    with moco_fast.use_backend("native"), Sizes():
        moco_fast.multi_info_nce(q, k, queue, 0.1, classes=5, **labels).backward()
    assert 0 < Sizes.largest <= 512 * 16 < 64 * 512


def test_compiles_and_autocasts():
    q, k, queue, labels = inputs()
    want = moco_fast.multi_info_nce(q, k, queue, 0.1, classes=5, **labels)
    compiled = torch.compile(moco_fast.multi_info_nce, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, queue, 0.1, classes=5, **labels), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moco_fast.multi_info_nce(q, k, queue, 0.1, classes=5, **labels), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": None},
            ValueError,
            "labels must be given, as labels, queue_labels and classes go together",
        ),
        ({"classes": None}, ValueError, "classes must be given"),
        ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
        ({"classes": 3}, ValueError, r"labels must be in \[-1, 3\), got -1 to 4"),
        (
            {"labels": torch.zeros(3, dtype=torch.long)},
            ValueError,
            r"labels must have shape \(37,\), one for each",
        ),
        ({"queue_labels": torch.zeros(131)}, TypeError, "queue_labels must be an int64 tensor"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
        ({"k": torch.zeros(37, 0, 19)}, ValueError, "k must hold at least one key for each query"),
        ({"k": torch.zeros(36, 2, 19)}, ValueError, "k must have the shape of q"),
    ],
)
def test_bad_arguments(change, error, message):
    q, k, queue, labels = inputs()
    arguments = {"q": q, "k": k, "queue": queue, "temperature": 0.1, "classes": 5} | labels | change
    with pytest.raises(error, match=message):
        moco_fast.multi_info_nce(**arguments)
