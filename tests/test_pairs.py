"""The passes that nt_xent and contrast are made of, where these do not reach: shards, GPUs before Hopper."""

import pytest
import torch
from conftest import interpreter_fault
from torch.nn import functional as F

from moco_fast.kernels import backend


@pytest.fixture(params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run; skips, by name, where they do not."""
    if reason := backend.cannot_serve("nt_xent", (torch.empty((1, 1), device=request.param),)):
        pytest.skip(reason)
    if request.param == "cpu" and (reason := interpreter_fault()):
        pytest.skip(reason)
    with torch.device(request.param):
        yield request.param


def nt_xent(shards, temperature, precision="highest"):
    """Loss rows and the gradient of their sum, of two views of shards (W, R, C) against the rows of all."""
    from moco_fast.kernels import pairs

    count, rows, features = shards.shape
    everyone = shards.reshape(1, -1, features)
    columns = pairs.operand(everyone, precision)
    sides = [(shard[None], pairs.operand(shard[None], precision), i * rows) for i, shard in enumerate(shards)]
    sizes = (1, rows, count * rows, features, temperature)
    found = []
    for x, x_hat, first in sides:
        part = pairs.sweep(x_hat, columns, *sizes, first=first, paired=True, gradient=False)
        found.append(pairs.losses(x, everyone, part, temperature, first=first, paired=True, gradient=False))
    # What ranks would gather between the passes: two numbers a row.
    log2_sum, miss = (torch.cat([getattr(f, name) for f in found], dim=1) for name in ("log2_sum", "miss"))
    dx = []
    for (x, x_hat, first), own in zip(sides, found, strict=True):
        part = pairs.sweep(
            x_hat, columns, *sizes, first=first, paired=True, gradient=True,
            x_log2_sum=own.log2_sum, y_log2_sum=log2_sum,
        )  # fmt: skip
        dx.append(pairs.gradients(x, everyone, part, miss, temperature, first=first, paired=True))
    return torch.cat([f.loss[0] for f in found]), torch.cat([d[0] for d in dx])


def formula(shards, temperature):
    """The same from the logits, by autograd in float64."""
    count, rows, features = shards.shape
    z = shards.double().reshape(-1, features).requires_grad_()
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.t() / temperature).fill_diagonal_(-torch.inf)
    own_shard = torch.arange(count * rows).reshape(count, rows)
    positives = own_shard.roll(rows // 2, dims=1).flatten()
    losses = F.cross_entropy(logits, positives, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


# Rows of a shard: fewer than a tile, and more; temperatures of the fixed shift and of the running maximum.
@pytest.mark.parametrize(
    ("shape", "temperature"),
    [((1, 10, 33), 0.2), ((3, 10, 33), 0.2), ((3, 10, 33), 0.01), ((2, 150, 32), 0.2)],
    ids=str,
)
def test_rows_of_a_shard_against_the_columns_of_all(device, shape, temperature):
    shards = torch.randn(shape) * 3
    want, want_dx = formula(shards, temperature)
    losses, dx = nt_xent(shards, temperature)
    bound = 1e-6 + 2**-21 / temperature  # two rows of 22 bits each, over T
    assert (losses - want).abs().max() <= bound * want.abs().max()
    assert (dx - want_dx).norm() <= bound * want_dx.norm()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_pointers_give_the_same_bits_as_descriptors(device, precision, monkeypatch):
    """What GPUs before Hopper run."""
    from moco_fast.kernels import pairs

    shards = torch.randn(1, 74, 37)
    want = nt_xent(shards, 0.1, precision)
    monkeypatch.setattr(pairs, "has_tma", lambda device: False)
    monkeypatch.setattr(pairs, "OLDER_TILES", {})  # other tiles would add up in another order
    got = nt_xent(shards, 0.1, precision)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("features", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_older_tiles(device, precision, features, monkeypatch):
    from moco_fast.kernels import pairs

    shards = torch.randn(1, 40, features)
    want, want_dx = nt_xent(shards, 0.1, precision)
    monkeypatch.setattr(pairs, "has_tma", lambda device: False)
    losses, dx = nt_xent(shards, 0.1, precision)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=0)
    assert (dx - want_dx).norm() <= 1e-3 * want_dx.norm()  # weights are rounded to fp16
