"""The bank of compat.lightly.NTXentLoss: what of it is kept, and what lightly would lose."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from moco_fast.compat.lightly import NTXentLoss
from moco_fast.compat.memory_bank import MemoryBank

WITHOUT_A_BANK = "the state dict has no memory_bank.bank, as lightly saves none"


def batch(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out0, out1 = torch.randn(2, n, dim, generator=generator)
    return out0.requires_grad_(), out1


def saved(module):
    """The state dict after a way through a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("size", [20, (20, 6)], ids=str)
def test_goes_on_from_a_state_dict(size):
    """Strictly, in a module whose bank has no width yet too; so does a copy."""
    first, loaded = NTXentLoss(0.1, size), NTXentLoss(0.1, size)
    for step in range(5):  # wraps
        first(*batch(7, 6, step))
    state = saved(first)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {"memory_bank.bank": (20, 6), "memory_bank.bank_ptr": (1,)}
    assert state["memory_bank.bank_ptr"] == 15
    loaded.load_state_dict(state)
    assert loaded.memory_bank.size == (20, 6)
    for step in range(5, 9):
        each = [criterion(*batch(7, 6, step)) for criterion in (first, loaded, copy.deepcopy(loaded))]
        assert each[0] == each[1]
        assert step > 5 or each[0] == each[2]
    assert torch.equal(first.memory_bank.bank, loaded.memory_bank.bank)


def test_a_state_dict_without_a_bank():
    """As lightly saves it: accepted with a warning, but not for a bank that has no width yet."""
    criterion = NTXentLoss(memory_bank_size=(20, 6))
    before = criterion.memory_bank.bank.clone()
    with pytest.warns(UserWarning, match=WITHOUT_A_BANK):
        criterion.load_state_dict({})
    assert torch.equal(criterion.memory_bank.bank, before)
    lazy = NTXentLoss(memory_bank_size=20)
    assert not lazy.state_dict()
    lazy.load_state_dict(saved(lazy))
    assert torch.isfinite(lazy(*batch(7, 6)))


def test_a_state_dict_that_does_not_fit():
    state = NTXentLoss(memory_bank_size=(20, 6)).state_dict()
    for size in (21, (21, 6), (20, 5)):
        with pytest.raises(RuntimeError, match=r"size mismatch for memory_bank\.bank"):
            NTXentLoss(memory_bank_size=size).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "memory_bank.bank"'):
        NTXentLoss().load_state_dict(state)


@pytest.mark.parametrize("n", [7, 20, 50])
def test_no_key_is_lost_at_the_end_of_the_bank(n):
    """Deliberately unlike lightly, where those that do not fit before the end are dropped."""
    criterion = NTXentLoss(memory_bank_size=(20, 6))
    keys = []
    for step in range(4):
        out0, out1 = batch(n, 6, step)
        criterion(out0, out1)
        keys.append(out1)
    newest = F.normalize(torch.cat(keys)[-20:], dim=1)
    assert criterion.memory_bank.bank_ptr == sum(min(n, 20) for _ in keys) % 20
    held = criterion.memory_bank.bank.roll(-int(criterion.memory_bank.bank_ptr), dims=0)
    torch.testing.assert_close(held, newest)


def test_lightly_loses_both():
    """The two differences, seen from there: if this fails, docs/migration.md is out of date."""
    pytest.importorskip("lightly", reason="lightly is not installed: nothing to compare with")
    from lightly.loss import NTXentLoss as Theirs

    theirs = Theirs(memory_bank_size=(20, 6))
    assert not theirs.state_dict()
    for step in range(3):
        out0, out1 = batch(7, 6, step)
        theirs(out0, out1)
    similarity = F.normalize(out1, dim=1) @ theirs.memory_bank.bank.t()
    assert (similarity.max(dim=1).values > 0.9999).tolist() == [True] * 6 + [False]


def test_without_a_gradient_the_bank_stays():
    criterion = NTXentLoss(memory_bank_size=(20, 6))
    before = saved(criterion)
    out0, out1 = batch(7, 6)
    criterion(out0.detach(), out1)
    criterion(out0.detach(), out1.clone().requires_grad_())
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name
    criterion(out0, out1)
    assert not torch.equal(criterion.memory_bank.bank, before["memory_bank.bank"])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [200, (200, 64), 0], ids=str)
def test_on_a_gpu(size):
    """The bank follows the batch to its device, as scripts do not move their loss; equal to the CPU's."""
    on_cpu = NTXentLoss(0.1, size)
    on_cpu(*batch(64, 64))  # now there is a bank
    on_gpu = copy.deepcopy(on_cpu)
    for step in range(5):
        out0, out1 = batch(64, 64, step)
        far0, far1 = out0.detach().cuda().requires_grad_(), out1.cuda()
        want, loss = on_cpu(out0, out1), on_gpu(far0, far1)
        torch.testing.assert_close(loss.cpu(), want, rtol=1e-3, atol=1e-3)  # operands are fp16
        want.backward()
        loss.backward()
        torch.testing.assert_close(far0.grad.cpu(), out0.grad, rtol=1e-2, atol=1e-4)
    for name, value in on_gpu.state_dict().items():
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[name])
    assert on_gpu.cpu()(out0, out1).device.type == "cpu"


def test_conversion_and_repr():
    criterion = NTXentLoss(0.1, (20, 6), gather_distributed=True)
    assert "temperature=0.1" in repr(criterion) and "size=(20, 6)" in repr(criterion)
    half = criterion.half()
    assert half.memory_bank.bank.dtype == torch.float16 and half.memory_bank.bank_ptr.dtype == torch.int64
    assert torch.isfinite(half(*batch(7, 6)))


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (-1, ValueError, "memory_bank_size must not be negative, got -1"),
        ((4, -1), ValueError, r"memory_bank_size must not be negative, got \(4, -1\)"),
        ((4, 2, 1), ValueError, r"memory_bank_size must be slots or \(slots, dim\), got \(4, 2, 1\)"),
        ((), ValueError, r"memory_bank_size must be slots or \(slots, dim\), got \(\)"),
        ((4, 0), ValueError, "dim of memory_bank_size must be at least 1, got 0"),
        (4.0, TypeError, "memory_bank_size must be an integer or a pair of them, got 4.0"),
        ("4", TypeError, "memory_bank_size must be an integer or a pair of them, got '4'"),
        ((4, None), TypeError, r"memory_bank_size must be an integer or a pair of them, got \(4, None\)"),
    ],
    ids=str,
)
def test_sizes_that_are_none(size, error, words):
    with pytest.raises(error, match=words):
        MemoryBank(size)


def test_sizes_of_any_sequence():
    assert MemoryBank([4, 2]).bank.shape == (4, 2) and MemoryBank(torch.Size([4, 2])).size == (4, 2)
    assert MemoryBank((0, 8)).bank is None and MemoryBank([3]).size == (3,)
