"""MoCo inside what training scripts wrap it in: DDP, FSDP2, accumulated gradients, torch.compile."""

import contextlib
import copy

import pytest
import ranks
import torch
from test_distributed import BATCH, build, own_part, views
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from moco_fast import distributed

STEPS = 6


def replicated(model):
    return DistributedDataParallel(model, broadcast_buffers=False)


def sharded(model):
    for part in (model.encoder_q, model.encoder_k, model):
        fully_shard(part)
    return model


def train(model, part, make=torch.optim.SGD, fused_ema=None, steps=STEPS):
    options = {"lr": 0.05, "momentum": 0.9} if make is not torch.optim.AdamW else {"lr": 1e-3}
    if fused_ema is not None:
        options |= {"ema": fused_ema, "m": 0.9}
    optimizer = make(model.parameters(), **options)
    losses = []
    for im_q, im_k in views(steps):
        loss = model(im_q[part], im_k[part], return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(state):
    return {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state.items()}


def rank_wrapped(rank, how, compiled):
    model = build()
    if compiled:
        model.encoder_q.compile()
        model.encoder_k.compile()
    wrapped = how(model)
    losses = train(wrapped, own_part(rank))
    model.verify_queue()
    return losses, whole(model.state_dict())


def assert_same(one, other):
    for (losses, state), (want, want_state) in zip(one, other, strict=True):
        assert losses == pytest.approx(want, rel=1e-5)
        assert list(state) == list(want_state)
        for name, value in want_state.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=2e-6)


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return ranks.run(2, rank_wrapped, replicated, False, folder=tmp_path_factory.mktemp("ddp"))


def test_fsdp_equals_ddp(under_ddp, tmp_path):
    assert_same(ranks.run(2, rank_wrapped, sharded, False, folder=tmp_path), under_ddp)


@pytest.mark.parametrize("how", [replicated, sharded])
def test_compiled_encoders(under_ddp, tmp_path, how):
    assert_same(ranks.run(2, rank_wrapped, how, True, folder=tmp_path, seconds=300), under_ddp)


def rank_local_queues(rank):
    found = []
    for wrap in (
        DistributedDataParallel,
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
    ):
        model = build(queue_sync="local")
        found.append((train(wrap(model), own_part(rank), steps=3), model.queue.clone()))
    return found


def test_ddp_of_a_compiled_model_leaves_queues_alone(tmp_path):
    """Its buffers have other names then, under which they are not broadcast either."""
    found = ranks.run(2, rank_local_queues, folder=tmp_path)
    for plain, compiled in found:
        assert compiled[0] == pytest.approx(plain[0], rel=1e-5)
        torch.testing.assert_close(compiled[1], plain[1])
    assert not torch.equal(found[0][0][1], found[1][0][1])


def rank_fused_ema(rank, how):
    model = build()
    wrapped = how(model)
    losses = train(wrapped, own_part(rank), moco_fast.SGD, model.move_ema_into_step())
    return losses, whole(model.state_dict())


def test_ema_in_the_step_under_fsdp(tmp_path):
    ddp, fsdp = (ranks.run(2, rank_fused_ema, how, folder=tmp_path) for how in (replicated, sharded))
    assert_same(fsdp, ddp)


def rank_sharded_as_one(rank):
    model = build()
    fully_shard(model)
    ((im_q, im_k),) = views(1)
    with pytest.raises(RuntimeError, match=r"needs fully_shard\(model.encoder_q\) and"):
        model(im_q[own_part(rank)], im_k[own_part(rank)], return_loss=True)


def test_fsdp_without_sharded_encoders_is_refused(tmp_path):
    ranks.run(2, rank_sharded_as_one, folder=tmp_path)


def parts_of(model, count):
    """Losses and queues of a few steps whose batch is computed in parts."""
    model.accumulation_steps = count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for im_q, im_k in views(STEPS):
        optimizer.zero_grad()
        sums = []
        for part_q, part_k in zip(im_q.chunk(count), im_k.chunk(count), strict=True):
            before = model.queue_ptr.item()
            loss = model(part_q, part_k, return_loss=True) / count
            loss.backward()
            sums.append(loss.item())
        assert model.queue_ptr.item() == (before + BATCH) % 50  # once, after the last
        optimizer.step()
        losses.append(sum(sums))
    return losses, model.state_dict()


def test_parts_of_a_step_are_the_step():
    """Without batch statistics: EMA and enqueue happen once, and every part meets the same queue."""
    model = without_batch_norm()
    losses, state = parts_of(copy.deepcopy(model), 1)
    for count in (2, 4):
        got, got_state = parts_of(copy.deepcopy(model), count)
        assert got == pytest.approx(losses, rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(got_state[name], value, rtol=1e-4, atol=1e-6)


def without_batch_norm():
    model = build()
    for encoder in (model.encoder_q, model.encoder_k):
        for i, layer in enumerate(encoder.body):
            if isinstance(layer, torch.nn.BatchNorm2d):
                encoder.body[i] = torch.nn.Identity()
    return model


def rank_in_parts(rank):
    """Two parts per step under DDP, which averages gradients with the second."""
    model = without_batch_norm()
    wrapped = DistributedDataParallel(model)
    model.accumulation_steps = 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for im_q, im_k in views(STEPS):
        optimizer.zero_grad()
        for i, (part_q, part_k) in enumerate(zip(im_q.chunk(2), im_k.chunk(2), strict=True)):
            share = slice(rank * len(part_q) // 2, (rank + 1) * len(part_q) // 2)
            with wrapped.no_sync() if i == 0 else contextlib.nullcontext():
                (wrapped(part_q[share], part_k[share], return_loss=True) / 2).backward()
        optimizer.step()
    model.verify_queue()
    return model.state_dict()


def test_parts_of_a_step_under_ddp(tmp_path):
    model = without_batch_norm()
    train(model, slice(None))
    for state in ranks.run(2, rank_in_parts, folder=tmp_path):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=2e-6)


def test_a_short_step_ends_when_it_is_told_to():
    """The last step of an epoch may have fewer parts; the next begins with its EMA as ever."""
    model = build()
    model.accumulation_steps = 4
    batches = list(views(8))
    for im_q, im_k in batches[:2]:
        model(im_q[:4], im_k[:4], return_loss=True)
    assert model.queue_ptr.item() == 0
    model.end_step()
    assert model.queue_ptr.item() == 8
    for im_q, im_k in batches[2:5]:
        model(im_q[:4], im_k[:4], return_loss=True)
    model.accumulation_steps = 1
    assert model.queue_ptr.item() == 20
    with torch.no_grad():
        for param in model.encoder_q.parameters():
            param.add_(1)
    before = model.encoder_k.fc[0].weight.clone()
    model(*batches[5], return_loss=True)
    assert model.queue_ptr.item() == 36 and not torch.equal(model.encoder_k.fc[0].weight, before)


def rank_long_run(rank, world_before, file, steps):
    """Steps with a global batch of 12, which does not divide 50, from a checkpoint if there is one."""
    model = build(seed=rank)
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["state"])
        model.shuffle.set_state(saved["shuffle"])
        model.verify_queue()
    generator = torch.Generator().manual_seed(1)
    share = 12 // distributed.world_size()
    for step in range(steps):
        images = torch.randn(12, 3, 4, 4, generator=generator)[rank * share : (rank + 1) * share]
        with torch.no_grad():
            model(images, images, return_loss=True)
        if step % 100 == 99:
            model.verify_queue()
    checksums = distributed.from_all(int(model.checksum()))
    assert len(set(checksums)) == 1
    if rank == 0:
        torch.save({"state": model.state_dict(), "shuffle": model.shuffle.state()}, file)
    return checksums[0], model.queue_ptr.item()


def test_queues_agree_for_a_thousand_steps_and_on_other_ranks(tmp_path):
    file, steps = tmp_path / "checkpoint.pth", 0
    for world in (2, 4, 3):
        count = 500 if world == 2 else 250
        found = ranks.run(world, rank_long_run, world, file, count, folder=tmp_path, seconds=300)
        steps += count
        assert len(set(found)) == 1 and found[0][1] == 12 * steps % 50
    assert steps == 1000
