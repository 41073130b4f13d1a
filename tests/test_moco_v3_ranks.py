"""MoCo v3 over two processes (gloo): equal to one, to the official scheme, and errors that all ranks hear."""

import copy
from functools import partial

import pytest
import ranks
import torch
from test_moco_v3 import TinyNet, assert_same_state, build, sgd, train, unchanged, views
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bench.eager_moco_v3 import EagerMoCoV3
from moco_fast import distributed
from moco_fast.models.moco_v3 import MoCo_ResNet


def uncut():
    """A model in training, in which no batch norm tells how the batch was cut."""
    model = build(encoder=partial(TinyNet, norm=False))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


def rank_of_one_process(rank):
    """Losses and state of two steps' worth of ranks."""
    model = uncut()
    each = 12 // distributed.world_size()
    part = slice(rank * each, (rank + 1) * each)
    wrapped = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    return train(wrapped, sgd(model), steps=5, part=part), model.state_dict()


def rank_statistics(rank):
    each = 12 // distributed.world_size()
    part = slice(rank * each, (rank + 1) * each)
    ((x1, x2),) = views()
    return uncut()(x1[part], x2[part], 0.9, return_stats=True)[1]


def rank_official(rank):
    """Both models under DDP, batch norm and all, each rank with its own part of the batch."""
    found = []
    for cls in (EagerMoCoV3, MoCo_ResNet):
        model = build(cls)
        losses = train(
            DistributedDataParallel(model), sgd(model), steps=5, part=slice(6 * rank, 6 * rank + 6)
        )
        found.append((losses, model.state_dict()))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    ((x1, x2),) = views()
    rows = 3 + rank  # in eval mode nothing is exchanged, so that ranks need not agree
    assert torch.isfinite(model(x1[:rows], x2[:rows], 0.9)) and unchanged(model, before)
    return found


def rank_disagreement(rank):
    messages = []
    for change in ("batch", "m", "T", "dim", "autocast", "type"):
        other = rank == 1
        model = build(dim=8 if other and change == "dim" else 16)
        before = copy.deepcopy(model.state_dict())
        model.T = 0.5 if other and change == "T" else 0.3
        ((x1, x2),) = views(7 if other and change == "batch" else 6)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=other and change == "autocast")
        with autocast, pytest.raises(distributed.Disagreement) as caught:
            model(None if other and change == "type" else x1, x2, 0.8 if other and change == "m" else 0.9)
        assert unchanged(model, before)
        messages.append(str(caught.value))
    return messages


def rank_everything(rank):
    return rank_of_one_process(rank), rank_official(rank), rank_disagreement(rank), rank_statistics(rank)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the functions above return, by function, then by rank."""
    return list(zip(*ranks.run(2, rank_everything, folder=tmp_path_factory.mktemp("ranks")), strict=True))


def test_two_ranks_equal_one_process(found):
    losses, state = rank_of_one_process(0)
    torch.testing.assert_close(torch.stack([f[0] for f in found[0]]).mean(0), losses, rtol=1e-5, atol=0)
    for _, got in found[0]:
        assert_same_state(got, state, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_one_process(found):
    first, second = found[3]
    for name, want in rank_statistics(0).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, want, rtol=1e-4, atol=1e-6)


def test_two_ranks_equal_the_official_scheme(found):
    for (want, want_state), (got, state) in found[1]:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert_same_state(state, want_state, rtol=1e-4, atol=1e-5)


def test_ranks_that_disagree_all_hear_of_it(found):
    first, second = found[2]
    assert first == second
    for message, words in zip(
        first,
        [
            "x1 must be the same on every rank, got ((6, 3, 8, 8), torch.float32) on rank 0, ((7, 3, 8, 8), ",
            "m must be the same on every rank, got 0.9 on rank 0, 0.8 on rank 1",
            "T must be the same on every rank, got 0.3 on rank 0, 0.5 on rank 1",
            "dim must be the same on every rank, got 16 on rank 0, 8 on rank 1",
            "autocast must be the same on every rank, got None on rank 0, torch.bfloat16 on rank 1",
            "rank 1: x1 must be a tensor of images (N, ...), got NoneType",
        ],
        strict=True,
    ):
        assert words in message


def rank_sharded(rank):
    """Losses and state under DDP and under FSDP2, batch norm and all; and sharded as a whole."""
    found, part = [], slice(6 * rank, 6 * rank + 6)
    for how in (partial(DistributedDataParallel, broadcast_buffers=False), sharded):
        model = build()
        losses = train(how(model), sgd(model), steps=4, part=part)
        state = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()}
        found.append((losses, state))
    model = build()
    fully_shard(model)
    ((x1, x2),) = views()
    with pytest.raises(RuntimeError, match=r"fully_shard\(model.base_encoder\) and fully_shard\(model.mom"):
        model(x1[part], x2[part], 0.9)
    return found


def sharded(model):
    for part in (model.base_encoder, model.momentum_encoder, model):
        fully_shard(part)
    return model


def test_fsdp_equals_ddp(tmp_path):
    for (want, want_state), (got, state) in ranks.run(2, rank_sharded, folder=tmp_path):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert_same_state(state, want_state, rtol=1e-4, atol=1e-5)
