"""A training loop written for lightly, with its imports and with ours; over one process and over two."""

import copy
from types import SimpleNamespace

import pytest
import ranks
import torch
from methods import Net, views
from torch import nn

from moco_fast.compat import lightly as ours

pytest.importorskip("lightly", reason="lightly is not installed: nothing to compare with")

STEPS = 20


def of_lightly():
    """What the documented MoCo script imports."""
    from lightly import loss
    from lightly.models import modules, utils
    from lightly.utils import scheduler

    homes = {
        "NTXentLoss": loss,
        "MoCoProjectionHead": modules,
        "deactivate_requires_grad": utils,
        "update_momentum": utils,
        "cosine_schedule": scheduler,
    }
    return SimpleNamespace(**{name: getattr(home, name) for name, home in homes.items()})


class MoCo(nn.Module):
    """The model as lightly's users write it."""

    def __init__(self, api, dim):
        super().__init__()
        self.backbone = Net(16)
        self.projection_head = api.MoCoProjectionHead(16, 32, dim)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        api.deactivate_requires_grad(self.backbone_momentum)
        api.deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


def train(api, size, temperature):
    """Losses of a run, and the model after it."""
    torch.manual_seed(0)
    model = MoCo(api, 128)
    criterion = api.NTXentLoss(temperature=temperature, memory_bank_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    losses = []
    for step, (x_query, x_key) in enumerate(views(STEPS, batch=16)):
        m = api.cosine_schedule(step, STEPS, 0.9, 1)
        api.update_momentum(model.backbone, model.backbone_momentum, m=m)
        api.update_momentum(model.projection_head, model.projection_head_momentum, m=m)
        loss = criterion(model(x_query), model.forward_momentum(x_key))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), model


@pytest.mark.parametrize("size", [(4096, 128), (64, 128)], ids=["of the documentation", "wraps"])
@pytest.mark.parametrize("replaced", ["the loss", "everything"])
def test_same_losses_as_with_lightly(size, replaced):
    """The sizes divide: at the end of the bank lightly drops no key. One seed, one initial state."""
    theirs = of_lightly()
    changed = vars(ours) if replaced == "everything" else {"NTXentLoss": ours.NTXentLoss}
    got, model = train(SimpleNamespace(**(vars(theirs) | changed)), size, 0.1)
    want, expected = train(theirs, size, 0.1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want[1:] - want[:-1]).abs().min() > 1e-4  # it moved
    assert list(model.state_dict()) == list(expected.state_dict())
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


def on_ranks(rank, temperature, size):
    """By loss: its value, both gradients and the bank after three steps."""
    found = {}
    for name, kind in (("theirs", of_lightly().NTXentLoss), ("ours", ours.NTXentLoss)):
        torch.manual_seed(0)
        criterion = kind(temperature, size, gather_distributed=True).double()
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            out0, out1 = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
            out0.requires_grad_(), out1.requires_grad_()
            loss = criterion(out0, out1)
            gradients = torch.autograd.grad(loss, (out0, out1))
        found[name] = (loss.detach(), *gradients, criterion.memory_bank.bank)
    return found


def of_both(rank):
    return {(T, size): on_ranks(rank, T, size) for T in (0.1, -0.5) for size in (0, (30, 7))}


def test_gathered_over_ranks_as_lightly_does(tmp_path):
    """Gradients and bank on every rank; without a bank the loss is the mean of the ranks' losses there."""
    results = ranks.run(2, of_both, folder=tmp_path)
    for case in results[0]:
        for result in results:
            mean = torch.stack([r[case]["theirs"][0] for r in results]).mean()
            expected = mean if case[1] == 0 else result[case]["theirs"][0]
            torch.testing.assert_close(result[case]["ours"][0], expected)
            for got, want in zip(result[case]["ours"][1:3], result[case]["theirs"][1:3], strict=True):
                torch.testing.assert_close(got, want)
            if case[1]:
                torch.testing.assert_close(result[case]["ours"][3], result[case]["theirs"][3])
                assert torch.equal(result[case]["ours"][3], results[0][case]["ours"][3])
