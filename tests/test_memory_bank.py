"""The memory bank equals its paper's formulas: InfoNCE and NCE, rows written after the loss."""

import copy

import methods
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.eager_mechanisms import EagerMemoryBank
from moco_fast.models import nce as nce_module
from moco_fast.models.memory_bank import LOSSES, MemoryBank

COUNT, K = 40, 30


def build(loss="info_nce", **options):
    torch.manual_seed(3)
    return MemoryBank(methods.Net, COUNT, 16, K, 0.2, 0.5, loss=loss, **options)


def eager(model):
    found = EagerMemoryBank(methods.Net, COUNT, 16, K, 0.2, 0.5, model.objective)
    if model.bank.dtype == torch.float64:
        found.double()
    found.load_state_dict(model.state_dict())
    return found


def batches(steps=1, batch=12):
    generator = torch.Generator().manual_seed(9)
    for im, _ in methods.views(steps, batch):
        yield im, torch.randint(COUNT, (batch,), generator=generator)  # some twice


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients(loss):
    model = build(loss).double()
    model.bank.copy_(F.normalize(model.bank, dim=1))  # unit rows in float64 too
    methods.assert_loss_and_gradients(model, eager(model).double(), next(batches()))


@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps(loss):
    model = build(loss)
    methods.assert_trajectory(model, eager(model), batches(20, batch=16))
    assert (model.Z > 0) == (loss == "nce")


@pytest.mark.parametrize("loss", LOSSES)
def test_eval_changes_nothing(loss):
    model = build(loss)
    methods.assert_eval_changes_nothing(model, next(batches(batch=5)))
    assert model.generator.state() is None


@pytest.mark.parametrize("loss", LOSSES)
def test_checkpoint(loss):
    """Z, fixed on the first batch, stays; the negatives go on with the generator's state."""
    given = list(batches(4))
    model, loaded = build(loss), build(loss)
    methods.train(model, given[:2])
    loaded.load_state_dict(model.state_dict())
    loaded.generator.set_state(model.generator.state())
    losses = [methods.train(x, given[2:]) for x in (copy.deepcopy(loaded), model, loaded)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_negatives_are_nobody_elses_random_numbers():
    """The rest of a program may draw, or not."""
    given, losses = list(batches(3)), []
    for draws in (0, 5):
        model = build()
        torch.manual_seed(1)
        found = []
        for batch in given:
            torch.rand(draws)
            found.append(model(*batch).item())
        losses.append(found)
        assert torch.get_rng_state().equal(torch.Generator().manual_seed(1).get_state()) == (draws == 0)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss):
    methods.assert_autocast_and_layout(build(loss), next(batches()))


@pytest.mark.parametrize("loss", LOSSES)
def test_stats(loss):
    im, indices = next(batches())
    model = build(loss)
    twin = copy.deepcopy(model)
    torch.manual_seed(4)
    _, stats = model(im, indices, return_stats=True)
    torch.manual_seed(4)
    drawn = twin.bank[torch.randint(COUNT, (K,))]
    q = F.normalize(twin.encoder(im).detach(), dim=1)
    pos, neg = (q * twin.bank[indices]).sum(1), q @ drawn.t()
    torch.testing.assert_close(stats["pos_sim"], pos.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats["neg_sim"], neg.mean(), rtol=1e-4, atol=1e-6)
    # A row that was also drawn is not above itself; rounding may say so.
    assert (stats["acc1"] - (pos > neg.amax(1) - 1e-6).float().mean()).abs() < 0.1


def test_rows_are_unit_and_the_last_of_two_counts():
    model = build()
    assert model.bank.shape == (COUNT, 16)
    torch.testing.assert_close(model.bank.norm(dim=1), torch.ones(COUNT))
    before = model.bank.clone()
    ((im, _),) = batches(batch=4)
    features = F.normalize(copy.deepcopy(model).encoder(im).detach(), dim=1)
    model(im, torch.tensor([7, 3, 7, 7]))
    want = before.clone()
    for row, i in ((3, 1), (7, 3)):
        want[row] = F.normalize(0.5 * before[row] + 0.5 * features[i], dim=0)
    torch.testing.assert_close(model.bank, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["random", "clustered"])
@pytest.mark.parametrize("temperature", [0.07, 0.02])
def test_nce_in_blocks(monkeypatch, spread, temperature):
    """fp32 in blocks of a few rows against float64 at once; no block larger than allowed."""
    torch.manual_seed(0)
    centre = torch.randn(8)
    f, v, drawn = (
        F.normalize(centre * (spread < 1) + spread * torch.randn(n, 8), dim=1) for n in (40, 40, 301)
    )
    f.requires_grad_()
    monkeypatch.setattr(nce_module, "BLOCK", 40 * 32)
    Z = nce_module.estimated_normaliser(f, drawn, temperature, 1000)

    def plain(dtype):
        """The formula at once: Z, losses and gradient."""
        x = f.detach().to(dtype).requires_grad_()
        logits = x @ drawn.to(dtype).t() / temperature
        constant = 1000 * logits.detach().exp().mean()
        shift = (constant * 301 / 1000).log()
        positive = (x * v.to(dtype)).sum(1) / temperature
        losses = F.softplus(shift - positive) + F.softplus(logits - shift).sum(1)
        losses.mean().backward()
        return constant, losses.detach(), x.grad

    want_Z, want, gradient = plain(torch.float64)
    eager_error = (plain(torch.float32)[2].double() - gradient).norm()
    torch.testing.assert_close(Z, want_Z, rtol=1e-5, atol=0)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    with Sizes():
        loss = nce_module.nce(f, v, drawn, temperature, want_Z, 1000)
        loss.mean().backward()
    assert Sizes.largest <= 40 * 32
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=0)
    # Logits of 1 / T are rounded by 6e-8 / T; clustered, the terms of the gradient cancel.
    assert (f.grad.double() - gradient).norm() <= 2 * eager_error + 2e-6 / temperature * gradient.norm()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"K": 1.5}, TypeError, "K must be an integer, got float 1.5"),
        ({"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1.1"),
        ({"T": 0.0}, ValueError, "T must be finite and above 0"),
        ({"loss": "ce"}, ValueError, "loss must be one of 'info_nce', 'nce', got 'ce'"),
    ],
)
def test_bad_constructor_arguments(options, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(**({"base_encoder": methods.Net, "count": 10, "dim": 8} | options))


def test_bad_batches_change_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    im, indices = next(batches())
    for bad, error, message in [
        (indices[:5], ValueError, r"indices must have shape \(12,\), one for each row of im, got \(5,\)"),
        (indices.float(), TypeError, "indices must be an int64 tensor of one dimension"),
        (indices.clone().fill_(COUNT), ValueError, r"indices must be in \[0, 40\), got 40 to 40"),
        (indices - COUNT, ValueError, r"indices must be in \[0, 40\)"),
    ]:
        with pytest.raises(error, match=message):
            model(im, bad)
    model.momentum = 2
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        model(im, indices)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
