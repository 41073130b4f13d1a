"""MoCo(symmetric=True): both views are queries in turn, against one queue."""

import copy

import methods
import pytest
import ranks
import torch
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from bench.eager_mechanisms import EagerSymmetricMoCo
from moco_fast import distributed

BATCH, STEPS = 16, 12


class Fused(moco_fast.MoCo):
    """Called as the eager model is."""

    def forward(self, im_q, im_k):
        return super().forward(im_q, im_k, return_loss=True)


def build(cls=Fused, K=50, **options):
    torch.manual_seed(3)
    return cls(methods.Net, 16, K, 0.9, 0.2, mlp=True, **options)


def symmetric(**options):
    return build(symmetric=True, **options)


def test_loss_and_gradients():
    model, eager = symmetric(), build(EagerSymmetricMoCo)
    eager.load_state_dict(model.state_dict())
    methods.assert_loss_and_gradients(model, eager, next(methods.views()))


def test_twenty_steps():
    """2 x 12 keys a step do not divide K = 50: the queue wraps inside a batch."""
    methods.assert_trajectory(symmetric(), build(EagerSymmetricMoCo), methods.views(20))


def test_the_loss_is_the_sum_of_both_directions():
    x1, x2 = next(methods.views())
    model = symmetric().eval()
    single = build().eval()
    single.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x1, x2), single(x1, x2) + single(x2, x1))
        loss, stats = moco_fast.MoCo.forward(model, x1, x2, return_loss=True, return_stats=True)
    assert torch.equal(loss, model(x1, x2)) and stats.rank.shape == (24,)


def test_each_view_is_enqueued_once_after_the_loss():
    x1, x2 = next(methods.views())
    model = symmetric()
    twin = copy.deepcopy(model)
    model(x1, x2)
    assert model.queue_ptr.item() == 24
    for rows, images in ((slice(0, 12), x1), (slice(12, 24), x2)):
        keys = torch.nn.functional.normalize(twin.encoder_k(images), dim=1)
        torch.testing.assert_close(model.rows[rows], keys, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.rows[24:], twin.rows[24:])


def parts(model, count, steps=6):
    """Losses of a few steps whose batch is computed in parts."""
    model.accumulation_steps = count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x1, x2 in methods.views(steps, BATCH):
        optimizer.zero_grad()
        total = 0
        for part1, part2 in zip(x1.chunk(count), x2.chunk(count), strict=True):
            loss = model(part1, part2) / count
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return torch.stack(losses)


def test_parts_of_a_batch():
    """Equal to the whole batch whose batch norm is split likewise; the queue too, slot by slot."""
    model, whole = symmetric(), symmetric()
    for each in (model, whole):
        for module in each.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    torch.testing.assert_close(parts(model, 2), parts(whole, 1), rtol=1e-5, atol=0)
    methods.assert_same_state(model, whole)


def rank_training(rank, options):
    model = symmetric(**options)
    each = BATCH // distributed.world_size()
    part = slice(rank * each, (rank + 1) * each)
    torch.manual_seed(rank)  # as is the seed of the shuffle
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    losses = methods.train(wrapped, ((a[part], b[part]) for a, b in methods.views(STEPS, BATCH)))
    model.verify_queue()
    return losses, model.state_dict()


@pytest.mark.parametrize("splits", [1, 2])
def test_ranks_equal_one_process_with_their_statistics(tmp_path, splits):
    found = ranks.run(2, rank_training, {"bn_splits": splits}, folder=tmp_path)
    model = symmetric(bn_splits=2 * splits)
    torch.manual_seed(0)
    losses = methods.train(model, methods.views(STEPS, BATCH))
    torch.testing.assert_close(torch.stack([f[0] for f in found]).mean(0), losses, rtol=1e-5, atol=0)
    for name, value in model.state_dict().items():
        got = found[0][1][name]
        if "running" in name:
            got = (got + found[1][1][name]) / 2
        torch.testing.assert_close(got, value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_refusals_change_nothing():
    model = build(moco_fast.MoCo, K=20, symmetric=True)
    before = copy.deepcopy(model.state_dict())
    x1, x2 = next(methods.views(batch=11))
    with pytest.raises(ValueError, match="return_loss must be True for a symmetric model"):
        model(x1[:4], x2[:4])
    with pytest.raises(ValueError, match="1 to K=20 images of both views, got 22"):
        model.loss(x1, x2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.loss(x1[:10], x2[:10])  # 2 x 10 keys fill the queue
