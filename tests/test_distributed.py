"""MoCo over processes (gloo): equal to one process that stands for them, and to the official scheme."""

import copy

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from bench.eager_moco import EagerDistributedMoCo
from moco_fast import distributed

STEPS, BATCH, SIZE = 20, 16, 8  # images in a step, over all ranks


class BatchNormNet(nn.Module):
    """Convolutions and batch norm, so that features show who shared a batch with whom."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def build(model=moco_fast.MoCo, seed=0, **options):
    torch.manual_seed(seed)
    return model(BatchNormNet, 16, 50, 0.9, 0.2, mlp=True, **options)  # the batch does not divide K = 50


def views(steps=STEPS, batch=BATCH):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
        yield tuple(images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2))


def train(model, *, fused, part=slice(None), steps=STEPS, layout=torch.contiguous_format):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for im_q, im_k in views(steps):
        im_q, im_k = (im[part].contiguous(memory_format=layout) for im in (im_q, im_k))
        loss = model(im_q, im_k, return_loss=True) if fused else F.cross_entropy(*model(im_q=im_q, im_k=im_k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def own_part(rank):
    each = BATCH // distributed.world_size()
    return slice(rank * each, (rank + 1) * each)


def rank_training(rank, options, scheme="all_to_all", fused=True):
    """Losses and state of a model under DDP; each rank has its own queue until the model agrees on one."""
    model = build(seed=0, **options)
    model.queue.mul_(1 if rank == 0 else -1)
    model.queue_ptr.fill_(0 if rank == 0 else 7)
    torch.manual_seed(rank)  # as is the seed of the shuffle
    # Statistics of each rank's own, to be averaged: what SplitBatchNorm keeps.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    assert {"queue", "queue_ptr"} <= set(wrapped.parameters_to_ignore)
    layout = torch.channels_last if fused else torch.contiguous_format
    with distributed.use_scheme(scheme):
        losses = train(wrapped, fused=fused, part=own_part(rank), layout=layout)
    model.verify_queue()
    with pytest.raises(RuntimeError, match=r"MoCo.loss bypasses DistributedDataParallel"):
        model.loss(*next(views()))
    return losses, model.state_dict(), copy.deepcopy(model).state_dict()


def averaged(states):
    """One state of several ranks: the mean of running statistics; everything else is the same on all."""
    result = dict(states[0])
    for name, value in states[0].items():
        others = [state[name] for state in states]
        if "running" in name:
            result[name] = torch.stack(others).mean(0)
        else:
            assert all(torch.equal(value, other) for other in others), name
    return result


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize(("world", "splits"), [(2, 1), (4, 1), (2, 2)], ids=["2", "4", "2x2"])
def test_ranks_equal_one_process_with_their_statistics(tmp_path, world, splits, fused):
    found = ranks.run(world, rank_training, {"bn_splits": splits}, "all_to_all", fused, folder=tmp_path)
    for _, state, copied in found:
        assert all(torch.equal(value, copied[name]) for name, value in state.items())
    model = build(bn_splits=world * splits)
    torch.manual_seed(0)
    losses = train(model, fused=fused)
    torch.testing.assert_close(torch.stack([f[0] for f in found]).mean(0), losses, rtol=1e-5, atol=0)
    got = averaged([state for _, state, _ in found])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scheme", distributed.SCHEMES[1:])
def test_other_schemes_give_the_same(tmp_path, scheme):
    """auto finds no GPU here, and stays with the default."""
    options = {"bn_splits": 2}
    default, other = (
        ranks.run(2, rank_training, options, s, folder=tmp_path) for s in ("all_to_all", scheme)
    )
    for one, another in zip(default, other, strict=True):
        torch.testing.assert_close(another[0], one[0], rtol=1e-5, atol=0)
        for name, value in one[1].items():
            torch.testing.assert_close(another[1][name], value, rtol=1e-4, atol=2e-6)


def rank_official(rank):
    """The official scheme and ours from one state, with the same permutations, both under plain DDP."""
    each = BATCH // distributed.world_size()
    draws = torch.Generator().manual_seed(11)
    losses = {}
    for kind in (EagerDistributedMoCo, moco_fast.MoCo):
        model = build(kind)
        if kind is moco_fast.MoCo:
            model.shuffle.generator = torch.Generator().manual_seed(11)
        else:
            model.permutation = lambda batch: distributed.balanced_order(batch // each, each, draws)
        losses[kind] = train(DistributedDataParallel(model), fused=False, part=own_part(rank))
        losses[kind, "state"] = model.state_dict()
    return losses


@pytest.mark.parametrize("world", [2, 4])
def test_equals_the_official_scheme(tmp_path, world):
    for found in ranks.run(world, rank_official, folder=tmp_path):
        torch.testing.assert_close(found[moco_fast.MoCo], found[EagerDistributedMoCo], rtol=1e-5, atol=0)
        for name, value in found[EagerDistributedMoCo, "state"].items():
            torch.testing.assert_close(found[moco_fast.MoCo, "state"][name], value, rtol=1e-4, atol=2e-6)


def rank_local_queue(rank):
    model = build(queue_sync="local")
    before = model.queue.clone()
    train(DistributedDataParallel(model), fused=True, part=own_part(rank), steps=2)
    model.verify_queue()
    model.eval()
    return model.queue, model.queue_ptr, torch.equal(model.queue[:, BATCH:], before[:, BATCH:])


def test_local_queues_hold_keys_of_their_rank(tmp_path):
    (first, ptr, kept), (second, _, also_kept) = ranks.run(2, rank_local_queue, folder=tmp_path)
    assert ptr.item() == BATCH and kept and also_kept  # two steps of half a batch each
    assert not torch.isclose(first[:, :BATCH], second[:, :BATCH]).all(0).any()


def rank_keys_return(rank):
    """With batch norm off, a shuffle must not be visible: keys are those of an unshuffled batch."""
    found = []
    for options in ({}, {"queue_sync": "local"}, {"bn_splits": 2}, {"bn_splits": 2, "queue_sync": "local"}):
        model = build(**options)
        for module in model.encoder_k.modules():
            if isinstance(module, nn.BatchNorm2d | moco_fast.SplitBatchNorm):
                module.eval()
        ((im_q, im_k),) = views(1)
        im_q, im_k = im_q[own_part(rank)], im_k[own_part(rank)]
        model(im_q, im_k, return_loss=True)
        want = F.normalize(model.encoder_k(im_k), dim=1)
        start = 0 if model.queue_sync == "local" else rank * len(im_k)
        found.append((model.rows[start : start + len(im_k)], want))
    return found


def test_keys_return_to_their_images(tmp_path):
    for found in ranks.run(4, rank_keys_return, folder=tmp_path):
        for got, want in found:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("devices", "rows"), [(1, 5), (2, 8), (4, 8), (4, 6), (8, 3), (16, 1), (3, 7)])
def test_balanced_order(devices, rows):
    generator = torch.Generator().manual_seed(0)
    traffic = torch.zeros(devices, devices)
    for _ in range(200):
        order = distributed.balanced_order(devices, rows, generator)
        assert torch.equal(order.sort().values, torch.arange(devices * rows))
        sent = torch.zeros(devices, devices)
        sent.index_put_(
            (order // rows, torch.arange(devices * rows) // rows), torch.ones(()), accumulate=True
        )
        assert sent.max() - sent.min() <= 1  # as many to everyone, to one
        traffic += sent
    # Whoever gets the one more is drawn anew: on average all get the same.
    assert (traffic / 200 - rows / devices).abs().max() < 0.2
    places = torch.stack([distributed.balanced_order(devices, rows, generator) for _ in range(200)])
    if rows > devices:  # every image goes everywhere
        assert all(
            len((places == image).nonzero()[:, 1].div(rows).int().unique()) == devices for image in (0, 1)
        )


def rank_no_shuffle(rank):
    """Without batch statistics to leak there is nothing to shuffle."""

    class Plain(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.fc = nn.Linear(3 * SIZE * SIZE, num_classes)

        def forward(self, x):
            return self.fc(x.flatten(1))

    model = moco_fast.MoCo(Plain, 8, 40)
    ((im_q, im_k),) = views(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "Exchange", None)
        model(im_q[own_part(rank)], im_k[own_part(rank)], return_loss=True)
    return model.rows[:BATCH], F.normalize(model.encoder_k(im_k), dim=1)


def test_no_batch_norm_no_shuffle(tmp_path):
    for got, want in ranks.run(2, rank_no_shuffle, folder=tmp_path):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_checksum_tells_queues_apart():
    queue = moco_fast.KeyQueue(8, 20)
    seen = {int(queue.checksum())}
    for change in (
        lambda: queue.queue[:, [3, 4]].copy_(queue.queue[:, [4, 3]]),
        lambda: queue.rows[3:5].copy_(queue.rows[3:5].flip(0)),  # other order of keys
        lambda: queue.rows[7].copy_(queue.rows[7].flip(0)),  # other order of features
        lambda: queue.rows[0, 0].neg_(),
        lambda: queue.queue_ptr.add_(1),
    ):
        change()
        seen.add(int(queue.checksum()))
    assert len(seen) == 5  # the first changed a copy, which is no change
    assert int(copy.deepcopy(queue).checksum()) in seen


def test_checksum_sees_changes_whose_sum_is_0():
    """Of the bits, by the odd numbers that columns count with."""
    queue = moco_fast.KeyQueue(8, 20)
    before = int(queue.checksum())
    bits = queue.rows.view(torch.int32)
    bits[4, 0] += 3
    bits[4, 1] -= 1
    assert int(queue.checksum()) != before


def test_rows_are_gathered_from_contiguous_memory(monkeypatch):
    """NCCL takes nothing else."""
    sent = []
    monkeypatch.setattr(distributed.collectives, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda out, x: sent.append(x))
    x = torch.randn(4, 3).t()
    assert distributed.all_gather_rows(x).shape == (6, 4)
    assert torch.equal(sent[0], x) and sent[0].is_contiguous()


def test_a_seed_below_0():
    torch.manual_seed(-1)
    shuffle, cpu = distributed.BatchShuffle(), torch.device("cpu")
    shuffle.agree(cpu)
    assert torch.equal(shuffle.plan(8, 2, cpu).order.sort().values, torch.arange(8))
