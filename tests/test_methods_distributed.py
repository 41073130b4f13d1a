"""Methods over two processes (gloo) equal one process with the whole batch; encoders without batch norm."""

from functools import partial

import methods
import pytest
import ranks
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed
from moco_fast.models.dino import DINO
from moco_fast.models.end_to_end import EndToEnd
from moco_fast.models.memory_bank import MemoryBank
from moco_fast.models.simclr import SimCLR

BATCH, STEPS, COUNT = 12, 8, 30
Plain = partial(methods.Net, norm=False)

MODELS = {
    "end-to-end": partial(EndToEnd, Plain, 16, 0.2, True),
    "simclr": partial(SimCLR, Plain, 16, 0.2),
    "dino": partial(DINO, Plain, 12, 70, 20),
    "memory bank": partial(MemoryBank, Plain, COUNT, 16, 20, 0.2),
    "memory bank, nce": partial(MemoryBank, Plain, COUNT, 16, 20, 0.2, loss="nce"),
}


def batches(name, part=slice(None)):
    generator = torch.Generator().manual_seed(9)
    for x1, x2 in methods.views(STEPS, BATCH):
        second = torch.randint(COUNT, (BATCH,), generator=generator) if "bank" in name else x2
        yield x1[part], second[part], *([0.9] if name == "dino" else [])


def rank_training(rank, name):
    torch.manual_seed(3)
    model = MODELS[name]()
    if rank > 0:  # what is no parameter, the model makes the same itself
        for buffer in model.buffers():
            buffer.add_(1)
    each = BATCH // distributed.world_size()
    torch.manual_seed(1 + rank)  # as the trainer does, for dropout
    part = slice(rank * each, (rank + 1) * each)
    losses = methods.train(DistributedDataParallel(model), batches(name, part))
    return losses, model.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_ranks_equal_one_process(tmp_path, name):
    (losses, state), (others, other_state) = ranks.run(2, rank_training, name, folder=tmp_path)
    torch.manual_seed(3)
    model = MODELS[name]()
    torch.manual_seed(1)
    want = methods.train(model, batches(name))
    torch.testing.assert_close((losses + others) / 2, want, rtol=1e-5, atol=1e-7)
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], other_state[key]), key
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


def rank_statistics(rank, name):
    torch.manual_seed(3)
    model = MODELS[name]()
    for module in model.modules():  # of a head: the features would tell how the batch was cut
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    each = BATCH // distributed.world_size()
    torch.manual_seed(1)
    _, stats = model(*next(batches(name, slice(rank * each, (rank + 1) * each))), return_stats=True)
    return stats


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_one_process(tmp_path, name):
    first, second = ranks.run(2, rank_statistics, name, folder=tmp_path)
    for key, want in rank_statistics(0, name).items():
        torch.testing.assert_close((first[key] + second[key]) / 2, want, rtol=1e-4, atol=1e-6)


def rank_disagreeing(rank, name):
    torch.manual_seed(3)
    model = MODELS[name]()
    x1, second, *rest = next(batches(name, slice(4 + rank)))
    with pytest.raises(distributed.Disagreement, match="must be the same on every rank"):
        model(x1, second, *rest)
    with pytest.raises(distributed.Disagreement, match=r"rank 1: .* must be a"):
        model(x1[:4] if rank == 0 else "x1", second[:4], *rest)
    model.eval()
    assert torch.isfinite(model(x1, second, *rest))  # nothing is exchanged


@pytest.mark.parametrize("name", ["simclr", "end-to-end", "dino", "memory bank"])
def test_ranks_that_disagree_fail_alike(tmp_path, name):
    ranks.run(2, rank_disagreeing, name, folder=tmp_path)


def rank_sharded(rank):
    """Losses of the methods without a second encoder, replicated and sharded; why DINO is not."""
    found = []
    for name in ("simclr", "end-to-end", "memory bank"):
        part, losses = slice(6 * rank, 6 * rank + 6), []
        for how in (DistributedDataParallel, fully_shard):
            torch.manual_seed(3)
            model = MODELS[name]()
            if how is fully_shard:
                fully_shard(model.encoder)
            losses.append(methods.train(how(model), batches(name, part)))
        found.append(losses)
    model = MODELS["dino"]()
    fully_shard(model)
    with pytest.raises(RuntimeError, match="DINO cannot be sharded by FSDP2"):
        model(*next(batches("dino", slice(6))))
    return found


def test_sharded_methods_equal_replicated(tmp_path):
    for found in ranks.run(2, rank_sharded, folder=tmp_path):
        for want, got in found:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
