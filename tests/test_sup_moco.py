"""SupMoCo equals supervised contrast over MoCo's queue, and its labels stay beside their keys."""

import copy

import methods
import pytest
import ranks
import torch
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from bench.eager_mechanisms import EagerSupMoCo
from moco_fast import distributed
from moco_fast.models.method import Method
from moco_fast.models.sup_moco import SupMoCo

CLASSES, K, BATCH = 4, 50, 12


def build(**options):
    torch.manual_seed(3)
    return SupMoCo(methods.Net, 16, K, 0.9, 0.2, mlp=True, classes=CLASSES, **options)


def eager(model):
    found = EagerSupMoCo(methods.Net, 16, K, 0.9, 0.2, True).to(model.queue.dtype)
    found.load_state_dict(model.state_dict())
    return found


def batches(steps=1, batch=BATCH, part=slice(None)):
    generator = torch.Generator().manual_seed(9)
    for x1, x2 in methods.views(steps, batch):
        labels = torch.randint(-1, CLASSES, (batch,), generator=generator)
        yield x1[part], x2[part], labels[part]


def test_loss_and_gradients():
    model = build().double()
    model.queue.copy_(torch.nn.functional.normalize(model.queue, dim=0))
    model.queue_labels.copy_(torch.randint(-1, CLASSES, (K,)))
    methods.assert_loss_and_gradients(model, eager(model), next(batches()))


def test_twenty_steps():
    """12 keys a step do not divide K = 50."""
    model = build()
    methods.assert_trajectory(model, eager(model), batches(20))
    assert model.queue_labels.min() == -1 and model.queue_labels.max() == CLASSES - 1


def test_eval_changes_nothing():
    methods.assert_eval_changes_nothing(build(), next(batches()))


def test_checkpoint():
    methods.assert_goes_on_from_a_checkpoint(build, batches(4))
    assert list(build().state_dict())[:3] == ["queue", "queue_ptr", "queue_labels"]


def test_checksum_sees_the_labels():
    model = build()
    before = model.checksum()
    model.queue_labels[3] = 2
    assert model.checksum() != before
    before = model.checksum()
    model.queue_labels[3], model.queue_labels[4] = -1, 2
    assert model.checksum() != before


def test_autocast():
    methods.assert_autocast_and_layout(build(), next(batches()))


def test_without_known_labels_it_is_moco():
    x1, x2, labels = next(batches())
    model = build()
    plain = moco_fast.MoCo(methods.Net, 16, K, 0.9, 0.2, mlp=True)
    state = model.state_dict()
    del state["queue_labels"]
    plain.load_state_dict(state)
    want, want_stats = plain.loss(x1, x2, return_stats=True)
    got, stats = model(x1, x2, torch.full_like(labels, -1), return_stats=True)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.pos, want_stats.pos)
    torch.testing.assert_close(stats.neg, want_stats.neg)
    assert torch.equal(stats.rank, want_stats.rank)


def test_symmetric_is_the_sum_of_both_directions():
    x1, x2, labels = next(batches())
    model = build(symmetric=True)
    model.queue_labels.copy_(torch.randint(-1, CLASSES, (K,)))
    single = build().eval()
    single.load_state_dict(model.state_dict())
    want = single(x1, x2, labels) + single(x2, x1, labels)
    torch.testing.assert_close(model.eval()(x1, x2, labels), want)
    model.train()(x1, x2, labels)
    assert torch.equal(model.queue_labels[:24], labels.repeat(2))


def test_parts_of_a_batch_and_keys_from_outside():
    model = build()
    model.accumulation_steps = 2
    (x1, x2, labels), *_ = batches()
    before = model.queue_labels.clone()
    model(x1[:6], x2[:6], labels[:6])
    assert torch.equal(model.queue_labels, before)
    model(x1[6:], x2[6:], labels[6:])
    assert torch.equal(model.queue_labels[:12], labels)
    model(x1[:6], x2[:6], labels[:6])
    model.enqueue_(torch.randn(3, 16))  # within a step: whose labels wait for its keys
    assert model.queue_labels[12:15].tolist() == [-1] * 3
    model.end_step()
    assert torch.equal(model.queue_labels[15:21], labels[:6])
    model.enqueue_(torch.randn(3, 16), labels=torch.tensor([2, 0, 1]))
    assert model.queue_labels[21:24].tolist() == [2, 0, 1]
    model.queue_labels.fill_(2)
    model.enqueue_(torch.randn(K, 16))
    assert (model.queue_labels == -1).all()


def rank_training(rank, splits):
    model = build(bn_splits=splits)
    each = BATCH // distributed.world_size()
    if rank > 0:
        model.queue_labels.add_(1)  # the model makes them rank 0's
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    losses = methods.train(wrapped, batches(10, part=slice(rank * each, (rank + 1) * each)))
    model.verify_queue()
    return losses, model.queue, model.queue_labels


def test_ranks_equal_one_process_with_their_statistics(tmp_path):
    (losses, queue, labels), (others, _, other_labels) = ranks.run(2, rank_training, 1, folder=tmp_path)
    model = build(bn_splits=2)
    torch.manual_seed(0)
    want = methods.train(model, batches(10))
    torch.testing.assert_close((losses + others) / 2, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(queue, model.queue, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, model.queue_labels) and torch.equal(labels, other_labels)


def test_bad_arguments_change_nothing():
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        SupMoCo(methods.Net, 16, K, classes=0)
    model = build()
    before = copy.deepcopy(model.state_dict())
    x1, x2, labels = next(batches())
    with pytest.raises(TypeError, match=r"call the model, model\(im_q, im_k, labels\)"):
        model.loss(x1, x2)
    for bad, error, message in [
        (labels[:3], ValueError, r"labels must have shape \(12,\), one for each row of im_q"),
        (labels.float(), TypeError, "labels must be an int64 tensor"),
        (labels + CLASSES, ValueError, r"labels must be in \[-1, 4\)"),
    ]:
        with pytest.raises(error, match=message):
            model(x1, x2, bad)
    with pytest.raises(ValueError, match="im_k must hold as many images as im_q"):
        model(x1, x2[:3], labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_encoder_is_reported_by_its_name():
    with pytest.raises(AttributeError, match="no attribute 'encoder'"):
        _ = Method().encoder
    model = build()
    assert model.encoder is model.encoder_q and "encoder" not in dict(model.named_children())
