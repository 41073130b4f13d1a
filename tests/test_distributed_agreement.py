"""What differs between ranks becomes the same error on all of them, soon, before anything is changed."""

import copy
import re
import time

import numpy as np
import pytest
import ranks
import torch
from test_distributed import BATCH, build, own_part, views
from torch.nn.parallel import DistributedDataParallel

from moco_fast import distributed

SECONDS = 100  # within which a disagreement has to surface; a hang would last for ever


def rank_disagreeing(rank, change):
    """One agreed step, then one in which the last rank is given something else."""
    model = build()
    wrapped = DistributedDataParallel(model)
    ((im_q, im_k),) = views(1)
    im_q, im_k = im_q[own_part(rank)], im_k[own_part(rank)]
    wrapped(im_q, im_k, return_loss=True).backward()
    # But for the statistics, which DistributedDataParallel broadcasts before it calls the model.
    watched = {name: value for name, value in model.state_dict().items() if ".body." not in name}
    before = copy.deepcopy(watched)
    if rank == distributed.world_size() - 1:
        im_q, im_k = CHANGES[change][0](model, im_q, im_k)
    began = time.monotonic()
    try:
        wrapped(im_q, im_k, return_loss=True)
    except (RuntimeError, ValueError) as error:
        same = all(torch.equal(value, before[name]) for name, value in watched.items())
        return type(error).__name__, str(error), same, time.monotonic() - began
    return "no error", "", False, 0.0


def fewer(model, im_q, im_k):
    return im_q[:-2], im_k[:-2]


def not_as_many_keys(model, im_q, im_k):
    return im_q, im_k[:-1]


def empty(model, im_q, im_k):
    return im_q[:0], im_k[:0]


def smaller(model, im_q, im_k):
    return im_q[:, :, :4], im_k[:, :, :4]


def other_dtype(model, im_q, im_k):
    return im_q, im_k.double()


def other_dtype_of_queries(model, im_q, im_k):
    return im_q.double(), im_k


def other_layout(model, im_q, im_k):
    return im_q, im_k.contiguous(memory_format=torch.channels_last)


def without_keys(model, im_q, im_k):
    return im_q, None


def another_shuffle(model, im_q, im_k):
    model.shuffle.set_state(torch.Generator().manual_seed(99).get_state())
    return im_q, im_k


def synchronised(model, im_q, im_k):
    """Batch norm that one rank alone has synchronised: it would not shuffle."""
    model.encoder_k = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder_k)
    return im_q, im_k


def autocast(model, im_q, im_k):
    torch.set_autocast_enabled("cpu", True)
    return im_q, im_k


def attribute(name, value):
    return lambda model, im_q, im_k: setattr(model, name, value) or (im_q, im_k)


CHANGES = {
    "fewer images": (fewer, r"im_q must be the same on every rank, got \(\(8, 3, 8, 8\), .*\(\(6, "),
    "not as many keys": (not_as_many_keys, "^rank 1: im_k must hold as many images as im_q, 8, got 7$"),
    "no images": (empty, "^rank 1: the batch must hold 1 to K=50 images, got 0"),
    "smaller images": (smaller, r"im_q must be .* \(\(8, 3, 4, 8\), torch.float32\) on rank 1"),
    "another dtype": (other_dtype, r"im_k must be .* torch.float32, 'NCHW'\) on rank 0, .*torch.float64"),
    "another dtype of queries": (
        other_dtype_of_queries,
        r"im_q must be .* got \(\(8, 3, 8, 8\), torch.float32",
    ),
    "another layout": (other_layout, r"im_k must be .* 'NCHW'\) on rank 0, .* 'NHWC'\) on rank 1"),
    "T": (attribute("T", 0.5), "^T must be the same on every rank, got 0.2 on rank 0, 0.5 on rank 1$"),
    "bad T": (attribute("T", -1.0), "^rank 1: T must be finite and above 0, got -1.0$"),
    "m": (attribute("m", 0.5), "^m must be the same on every rank, got 0.9 on rank 0, 0.5 on rank 1$"),
    "accumulation": (attribute("accumulation_steps", 2), r"^accumulation_steps must be the same on every"),
    "no keys": (without_keys, r"^rank 1: im_k must be a tensor of images \(N, ...\), got NoneType$"),
    "another shuffle": (another_shuffle, "^the state of the shuffle must be the same on every rank"),
    "synchronised": (synchronised, r"^MOCO_FAST_SHUFFLE must be .*True\) on rank 0, .*False\) on rank 1$"),
    "autocast": (autocast, "^autocast must be .* None on rank 0, torch.bfloat16 on rank 1$"),
    "ema_in_step": (attribute("ema_in_step", True), "^ema_in_step must be the same on every rank"),
    "queue_sync": (attribute("queue_sync", "local"), "^queue_sync must be .* global on rank 0, local on"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_error_on_every_rank(tmp_path, change):
    found = ranks.run(2, rank_disagreeing, change, folder=tmp_path, seconds=2 * SECONDS)
    assert len({(kind, message) for kind, message, _, _ in found}) == 1, found
    kind, message, same, _ = found[0]
    assert kind == "Disagreement" and re.search(CHANGES[change][1], message), message
    for _, _, same, seconds in found:
        assert same and seconds < SECONDS


def rank_built_differently(rank, options):
    """Models that differ from the start, without DistributedDataParallel, which would find some of it."""
    model = build(**options[rank])
    ((im_q, im_k),) = views(1)
    try:
        model(im_q[own_part(rank)], im_k[own_part(rank)], return_loss=True)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "no error", ""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bn_splits": 5}, "bn_splits must be the same on every rank, got 1 on ranks 0, 2, 5 on rank 1"),
        ({"queue_sync": "local"}, "queue_sync must be"),
    ],
)
def test_models_built_differently(tmp_path, other, message):
    found = ranks.run(3, rank_built_differently, [{}, other, {}], folder=tmp_path, seconds=2 * SECONDS)
    assert len(set(found)) == 1 and found[0][0] == "Disagreement" and message in found[0][1], found


def rank_of_other_sizes(rank, sizes):
    from test_distributed import BatchNormNet

    import moco_fast

    torch.manual_seed(0)
    model = moco_fast.MoCo(BatchNormNet, *sizes[rank])
    ((im_q, im_k),) = views(1)
    try:
        model(im_q[own_part(rank)], im_k[own_part(rank)], return_loss=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(16, 50), (16, 60)], "K must be the same on every rank, got 50 on rank 0, 60 on rank 1"),
        ([(16, 50), (8, 50)], "dim must be the same on every rank, got 16 on rank 0, 8 on rank 1"),
        ([(16, 50, 0.9, 0.2, True), (16, 50, 0.9, 0.2, False)], "the encoders' parameters"),
    ],
)
def test_models_of_other_sizes(tmp_path, sizes, message):
    found = ranks.run(2, rank_of_other_sizes, sizes, folder=tmp_path, seconds=2 * SECONDS)
    assert len(set(found)) == 1 and message in found[0], found


def rank_queue_drifts(rank):
    model = build()
    model.verify_queue()
    if rank in (1, 2):
        model.queue[0, 3] += 1e-3
    try:
        model.verify_queue()
    except distributed.Disagreement as error:
        return str(error)


def test_a_queue_that_drifted_is_found(tmp_path):
    found = ranks.run(3, rank_queue_drifts, folder=tmp_path)
    assert set(found) == {"the queue differs between ranks: not that of rank 0 on ranks 1, 2"}


def rank_facts(rank):
    try:
        distributed.check_agreement({"T": (0.2, np.float64(0.2))[rank]})
    except RuntimeError as error:
        return str(error), distributed.to_rank_0(10 * rank)


def test_facts_that_read_alike_are_told_apart(tmp_path):
    """And what is sent to rank 0 arrives there alone."""
    message = "T must be the same on every rank, got 0.2 on rank 0, np.float64(0.2) on rank 1"
    assert ranks.run(2, rank_facts, folder=tmp_path) == [(message, [0, 10]), (message, [])]
    assert distributed.to_rank_0(3) == [3]


def rank_largest(rank):
    return distributed.largest(rank, -rank, 7)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_largest(tmp_path, world):
    assert ranks.run(world, rank_largest, folder=tmp_path) == [[world - 1, 0, 7]] * world


def rank_group_destroyed(rank):
    distributed.from_all(rank)
    assert ranks.gloo_threads()
    torch.distributed.destroy_process_group()
    ranks.assert_no_gloo_threads()


def test_nothing_keeps_a_group_that_is_destroyed(tmp_path):
    """Its threads, if there were any when Python ends, might abort the process."""
    assert ranks.run(2, rank_group_destroyed, folder=tmp_path) == [None] * 2


def rank_batches_shrink_together(rank):
    """A last batch that is smaller on every rank is no disagreement."""
    model = build()
    for size in (8, 4, 8):
        ((im_q, im_k),) = views(1, batch=size)
        half = slice(rank * size // 2, (rank + 1) * size // 2)
        model(im_q[half], im_k[half], return_loss=True)
    model.verify_queue()
    return model.queue_ptr.item()


def test_batches_may_change_together(tmp_path):
    assert ranks.run(2, rank_batches_shrink_together, folder=tmp_path) == [20, 20]


def test_one_process_raises_as_before():
    model = build()
    images = torch.zeros(BATCH, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^im_k must hold as many"):
        model(images, images[1:])
