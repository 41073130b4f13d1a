"""moco_fast.compat.lightly against the installed lightly: equal outputs, gradients, names and schedules."""

import copy
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from largest import Largest
from methods import Net
from torch.nn import functional as F

from moco_fast.compat import lightly as ours

pytest.importorskip("lightly", reason="lightly is not installed: nothing to compare with")
from lightly import loss as lightly_loss
from lightly.models import modules as lightly_modules
from lightly.models import utils as lightly_utils
from lightly.utils import scheduler as lightly_scheduler


def pair(n, dim, dtype=torch.float64, wanted=(True, True)):
    """Two raw views that resemble each other."""
    out0 = 3 * torch.randn(n, dim, dtype=dtype)
    out1 = out0 + torch.randn(n, dim, dtype=dtype)
    return tuple(x.requires_grad_(want) for x, want in zip((out0, out1), wanted, strict=True))


def result(criterion, out0, out1):
    """Loss, and the gradients of those that want one."""
    loss = criterion(out0, out1)
    return [loss, *torch.autograd.grad(loss, [x for x in (out0, out1) if x.requires_grad])]


def both(**options):
    """Their loss and ours, with the same bank: drawn alike from one seed."""
    made = []
    for kind in (lightly_loss.NTXentLoss, ours.NTXentLoss):
        torch.manual_seed(3)
        made.append(kind(**options))
    return made


@pytest.mark.parametrize("shape", [(1, 5), (5, 33), (37, 16), (2, 1)], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 10, -1.0])
@pytest.mark.parametrize("gather", [False, True])
def test_batch_equals_lightly(shape, temperature, gather):
    theirs, mine = both(temperature=temperature, gather_distributed=gather)
    views = pair(*shape)
    for got, want in zip(result(mine, *views), result(theirs, *views), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert not mine.state_dict() and mine.memory_bank.bank is None


@pytest.mark.parametrize("wanted", [(True, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("temperature", [0.07, 1, -0.5])
@pytest.mark.parametrize("gather", [False, True])
def test_bank_equals_lightly(wanted, temperature, gather):
    """Loss, gradients and bank over more steps than fill it; the negatives are those before the step."""
    theirs, mine = both(temperature=temperature, memory_bank_size=(24, 9), gather_distributed=gather)
    assert torch.equal(mine.memory_bank.bank, theirs.memory_bank.bank)
    theirs, mine = theirs.double(), mine.double()
    for _ in range(5):
        views = pair(8, 9, wanted=wanted)
        for got, want in zip(result(mine, *views), result(theirs, *views), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(mine.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(mine.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


@pytest.mark.parametrize("size", [0, (64, 24)], ids=str)
def test_fp32_equals_lightly(size):
    theirs, mine = both(temperature=0.1, memory_bank_size=size)
    views = pair(16, 24, torch.float32)
    for got, want in zip(result(mine, *views), result(theirs, *views), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("temperature", [0.1, 1, 10])
@pytest.mark.parametrize("gather", [False, True])
def test_batch_equals_the_paper_written_out(n, dim, temperature, gather):
    """Algorithm 1 of the SimCLR paper, pair by pair; and exchanged views change nothing."""
    out0, out1 = torch.randn(n, dim), torch.randn(n, dim)
    z = torch.cat([out0, out1]).double().numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(2 * n):
        others = [math.exp(z[i] @ z[j] / temperature) for j in range(2 * n) if j != i]
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / sum(others))
    criterion = ours.NTXentLoss(temperature, gather_distributed=gather)
    assert criterion(out0, out1).item() == pytest.approx(total / (2 * n), abs=1e-5)
    assert criterion(out1, out0).item() == pytest.approx(total / (2 * n), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 8, 16])
@pytest.mark.parametrize("slots", [0, 1, 2, 8, 15, 16, 17])
@pytest.mark.parametrize("temperature", [0.1, 1, 7])
@pytest.mark.parametrize("size", [lambda slots: slots, lambda slots: (slots, 2)], ids=["slots", "pair"])
def test_parallel_embeddings(n, slots, temperature, size):
    """When all point one way every negative is as near as the positive: the loss counts them."""
    out0, out1 = (torch.rand(n, 1).add(0.1) * torch.tensor([1.0, 2.0]) for _ in range(2))
    criterion = ours.NTXentLoss(temperature, size(slots))
    for _ in range(slots // n + 2):  # fills a bank
        loss = criterion(out0.requires_grad_(), out1)
    assert loss.item() == pytest.approx(math.log(1 + (slots or 2 * n - 2)), abs=1e-5)


@pytest.mark.parametrize(("dim", "temperature"), [(32, 0.5), (1, 0.5), (32, -1.0)])
def test_exchanged_views_have_one_loss(dim, temperature):
    criterion = ours.NTXentLoss(temperature)
    for n in range(1, 20):
        out0, out1 = torch.randn(n, dim), torch.randn(n, dim)
        assert criterion(out0, out1).item() == pytest.approx(criterion(out1, out0).item(), abs=1e-5)


@pytest.mark.parametrize("size", [64, (64, 32)], ids=str)
def test_a_bank_of_any_batch_size(size):
    criterion = ours.NTXentLoss(memory_bank_size=size)
    for n in [*range(1, 20), 64, 100]:
        assert torch.isfinite(criterion(torch.randn(n, 32, requires_grad=True), torch.randn(n, 32)))


@pytest.mark.parametrize("kind", [lightly_loss.NTXentLoss, ours.NTXentLoss])
def test_what_neither_accepts(kind, monkeypatch):
    for bad in ({"temperature": 0.0}, {"temperature": -1e-9}, {"memory_bank_size": -1}):
        with pytest.raises(ValueError, match=r"temperature|memory|size"):
            kind(**bad)
    for size in ((-1, 8), (8, -1), (8, 8, 8)):
        with pytest.raises(ValueError, match=r"memory|size"):
            kind(memory_bank_size=size)
    assert kind(gather_distributed=True).gather_distributed
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed"):
        kind(gather_distributed=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, (32, 16)], ids=str)
def test_autocast(dtype, size):
    """One view in 16 bits, the other not: the loss is fp32, gradients have the types of their inputs."""
    criterion = ours.NTXentLoss(0.2, size)
    out0, out1 = pair(8, 16, torch.float32)
    want = copy.deepcopy(criterion)(out0, out1)
    half = out0.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = criterion(half, out1)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype and out1.grad.dtype == torch.float32
    assert torch.isfinite(half.grad).all() and loss.item() == pytest.approx(want.item(), abs=0.05)


@pytest.mark.parametrize(("size", "product"), [(0, 4 * 512 * 512), ((2048, 4), 512 * 2048)], ids=str)
def test_no_logits_in_memory(size, product):
    theirs, mine = both(memory_bank_size=size)
    for criterion, held in ((theirs, True), (mine, False)):
        with Largest() as largest:
            result(criterion, *pair(512, 4, torch.float32))
        assert (largest.elements >= product / 4) == held


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [2, 3])
def test_head_equals_lightly(layers, batch_norm):
    heads = []
    for kind in (lightly_modules.MoCoProjectionHead, ours.MoCoProjectionHead):
        torch.manual_seed(1)
        heads.append(kind(12, 20, 7, num_layers=layers, batch_norm=batch_norm))
    theirs, mine = heads
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(6, 12)
    assert torch.equal(mine(x), theirs(x))
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())


def test_head_keys_and_errors():
    assert list(ours.MoCoProjectionHead().state_dict()) == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    ]
    for name, value in (("input_dim", 0), ("hidden_dim", -1), ("output_dim", 0), ("num_layers", 1)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            ours.MoCoProjectionHead(**{name: value})


@pytest.mark.parametrize("m", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_update_momentum_equals_lightly(m, frozen):
    model, theirs, mine = Net(), Net(), Net()
    mine.load_state_dict(theirs.state_dict())
    model.bn1.running_mean.fill_(5)
    for name, copied in (("theirs", theirs), ("mine", mine)):
        if frozen:
            (lightly_utils if name == "theirs" else ours).deactivate_requires_grad(copied)
        assert all(p.requires_grad != frozen for p in copied.parameters())
    lightly_utils.update_momentum(model, theirs, m)
    ours.update_momentum(model, mine, m)
    for (name, got), want in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)
    assert mine.bn1.running_mean.eq(0).all()  # parameters alone
    ours.activate_requires_grad(mine)
    assert all(p.requires_grad for p in mine.parameters())


def test_update_momentum_of_another_model():
    with pytest.raises(ValueError, match="sources must pair up with targets: got 7 sources, 5 targets"):
        ours.update_momentum(Net(), Net(norm=False), 0.9)
    with pytest.raises(ValueError, match=r"m must be in \[0, 1\], got 1.5"):
        ours.update_momentum(Net(), Net(), 1.5)


@pytest.mark.parametrize("max_steps", [0, 1, 2, 7])
@pytest.mark.parametrize("period", [None, 1, 5])
def test_schedule_equals_lightly(max_steps, period):
    for step in range(12):
        arguments = (step, max_steps, 0.996, 1.0, period)
        found = []
        for schedule in (lightly_scheduler.cosine_schedule, ours.cosine_schedule):
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found.append((schedule(*arguments), [w.category for w in warned]))
        assert found[1][0] == pytest.approx(found[0][0], abs=1e-12) and found[1][1] == found[0][1]
        assert type(found[1][0]) is float


@pytest.mark.parametrize("schedule", [lightly_scheduler.cosine_schedule, ours.cosine_schedule])
@pytest.mark.parametrize("bad", [{"step": -1}, {"max_steps": -1}, {"period": 0}, {"period": -3}], ids=str)
def test_what_no_schedule_accepts(schedule, bad):
    with pytest.raises(ValueError, match=r"(?i)step|period"):
        schedule(**({"step": 1, "max_steps": 5, "start_value": 0.0, "end_value": 1.0} | bad))


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (lightly_loss, "NTXentLoss"),
        (lightly_modules, "MoCoProjectionHead"),
        (lightly_utils, "update_momentum"),
        (lightly_utils, "deactivate_requires_grad"),
        (lightly_utils, "activate_requires_grad"),
        (lightly_scheduler, "cosine_schedule"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_signatures(theirs, name):
    """Names, order and defaults of all arguments."""
    got, want = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()]
    if name == "NTXentLoss":
        got, want = (inspect.signature(getattr(m, name).forward).parameters for m in (ours, theirs))
        assert list(got) == list(want)


@pytest.mark.parametrize(
    ("views", "error", "words"),
    [
        ((torch.ones(2, 3), torch.ones(3, 3)), ValueError, r"out1 must have the shape of out0, \(2, 3\)"),
        ((torch.ones(2), torch.ones(2)), ValueError, "out0 must have 2 dimensions"),
        ((torch.ones(0, 3), torch.ones(0, 3)), ValueError, "out0 must hold at least one row"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "out0 must have a floating-point dtype"),
        ((torch.ones(2, 3), [1, 2]), TypeError, r"out1 must be a torch.Tensor, got list"),
        ((torch.ones(2, 4), torch.ones(2, 4)), ValueError, r"out0 and out1 must have shape \(N, 3\)"),
    ],
    ids=str,
)
def test_errors_name_the_argument_and_change_nothing(views, error, words):
    criterion = ours.NTXentLoss(memory_bank_size=(8, 3))
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(error, match=words):
        criterion(*views)
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def test_a_nan_reaches_the_loss():
    out0, out1 = pair(4, 8, torch.float32)
    for size in (0, (16, 8)):
        broken = F.normalize(out0.detach(), dim=1)
        broken[2, 3] = math.nan
        assert ours.NTXentLoss(memory_bank_size=size)(broken.requires_grad_(), out1).isnan()
