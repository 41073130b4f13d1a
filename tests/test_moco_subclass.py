"""Subclasses of MoCo as scripts have them: methods of the official class called and overridden, copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import ranks
import torch
from test_moco import TinyNet, build, from_logits, train, views
from torch import nn
from torch.nn import functional as F

import moco_fast
from bench.eager_moco import EagerMoCo
from moco_fast.compat import builder


def forward_by_hand(self, im_q, im_k):
    """Algorithm 1 of the paper by the methods of the official class."""
    q = F.normalize(self.encoder_q(im_q), dim=1)
    with torch.no_grad():
        self._momentum_update_key_encoder()
        images, order = self._batch_shuffle_ddp(im_k)
        k = self._batch_unshuffle_ddp(F.normalize(self.encoder_k(images), dim=1), order)
    positives = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positives, q @ self.queue.clone().detach()], dim=1) / self.T
    self._dequeue_and_enqueue(k)
    return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)


class ByHand(moco_fast.MoCo):
    forward = forward_by_hand


class ByHandInCompat(builder.MoCo):
    forward = forward_by_hand


@pytest.mark.parametrize("cls", [ByHand, ByHandInCompat])
def test_a_forward_of_official_methods(cls):
    want_model, model = build(EagerMoCo), build(cls)
    torch.testing.assert_close(
        train(model, from_logits, steps=8), train(want_model, from_logits, steps=8), rtol=1e-5, atol=0
    )
    for name, value in want_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def train_over_ranks(rank, queue_sync):
    models = [build(cls, queue_sync=queue_sync) for cls in (ByHand, moco_fast.MoCo)]
    batches = [(im_q + rank, im_k + rank) for im_q, im_k in views(count=3)]
    found = []
    for model in models:
        torch.manual_seed(5)  # from which the ranks agree on their shuffle
        losses = [F.cross_entropy(*model(*batch)).item() for batch in batches]
        found.append((losses, model.queue.clone(), int(model.queue_ptr)))
    return found


@pytest.mark.parametrize("queue_sync", ["global", "local"])
def test_a_forward_of_official_methods_over_ranks(tmp_path, queue_sync):
    """The keys of all ranks, in the same shuffle, as with the forward of the library."""
    found = ranks.run(2, train_over_ranks, queue_sync, folder=tmp_path)
    for by_hand, ours in found:
        torch.testing.assert_close(by_hand, ours, rtol=1e-5, atol=1e-6)
        assert ours[2] == 3 * 12 * (2 if queue_sync == "global" else 1) % 64
    assert torch.equal(found[0][0][1], found[1][0][1]) == (queue_sync == "global")


@pytest.mark.parametrize("base", [moco_fast.MoCo, builder.MoCo])
def test_the_update_of_the_key_encoder_may_be_overridden(base):
    class WithBuffers(base):
        def _momentum_update_key_encoder(self):
            super()._momentum_update_key_encoder()
            self.encoder_k.bn.running_mean.fill_(7.0)

    model, plain = build(WithBuffers), build(base)
    ((im_q, im_k),) = views()
    for each in (model, plain):
        with torch.no_grad():
            each.encoder_q.fc[2].bias += 1
        each.loss(im_q, im_k)
    for got, want in zip(model.encoder_k.parameters(), plain.encoder_k.parameters(), strict=True):
        assert torch.equal(got, want)
    assert model.encoder_k.bn.running_mean.min() > 5 > plain.encoder_k.bn.running_mean.max()


@pytest.mark.parametrize(
    ("base", "name", "instead"),
    [
        (moco_fast.MoCo, "_dequeue_and_enqueue", "override enqueue_"),
        (builder.MoCo, "_dequeue_and_enqueue", "override enqueue_"),
        (builder.MoCo, "_batch_shuffle_ddp", "no process group is needed"),
        (builder.MoCo, "_batch_unshuffle_ddp", "no process group is needed"),
        (builder.MoCo, "_build_projector_and_predictor_mlps", "MoCo v3 is MoCo_ResNet and MoCo_ViT"),
        (moco_fast.MoCo_ResNet, "_build_projector_and_predictor_mlps", "set PROJECTOR_LAYERS"),
        (moco_fast.MoCo_ViT, "contrastive_loss", "override forward"),
    ],
)
def test_an_override_that_nothing_calls_is_refused(base, name, instead):
    def method(self, *arguments):
        raise AssertionError

    with pytest.raises(TypeError, match=rf"Mine\.{name} would never be called: .*{instead}"):
        type("Mine", (base,), {name: method})
    mixed_in = type("MixedIn", (), {name: method})
    with pytest.raises(TypeError, match=rf"MixedIn\.{name} would never be called"):
        type("Mine", (mixed_in, base), {})
    own = type("Own", (base,), {"forward": forward_by_hand})
    assert issubclass(type("Mine", (own,), {name: method}), base)  # whose forward may call it


@pytest.mark.parametrize("name", ["loss", "encoder", "features", "rows", "negatives"])
def test_a_module_by_the_name_of_a_method_is_refused(name):
    """It would be registered, and the method be found instead of it."""
    model = build()
    with pytest.raises(TypeError, match=f"'{name}' is a name of MoCo's own"):
        setattr(model, name, nn.CrossEntropyLoss())
    model.criterion, model.encoder_k = nn.CrossEntropyLoss(), model.encoder_q
    assert model.encoder_k is model.encoder_q


class Headless(nn.Module):
    """An encoder whose last layer has a name of its own."""

    def __init__(self, num_classes, width=None):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if width:  # a layer named as a head before the last one
            self.fc = nn.Linear(8, width)
        self.out = nn.Linear(width or 8, num_classes)

    def forward(self, x):
        x = self.net(x)
        return self.out(self.fc(x) if hasattr(self, "fc") else x)


@pytest.mark.parametrize("width", [None, 32])
def test_encoders_without_a_head_as_the_official_class_takes_them(width):
    def encoder(num_classes):
        return Headless(num_classes, width)

    losses = []
    for cls in (EagerMoCo, moco_fast.MoCo):
        torch.manual_seed(0)
        model = cls(encoder, 16, 64)
        losses.append(train(model, from_logits, steps=3))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    if width is None:
        with pytest.raises(ValueError, match="must have a linear head named fc, head"):
            model.features(next(views())[0])
        with pytest.raises(ValueError, match="must have a linear head named fc, head"):
            moco_fast.MoCo(encoder, 16, 64, mlp=True)


class Masked(TinyNet):
    """An encoder with parameters that no gradient moves: a mask, a table of integers, a switch."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        for name, value in (("mask", torch.full((2, 2), -torch.inf).triu(1)), ("table", torch.arange(3))):
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self.switch = nn.Parameter(torch.tensor(True), requires_grad=False)


def test_v3_follows_parameters_of_any_kind():
    model = moco_fast.MoCo_ResNet(Masked, 16, 24, 0.3)
    model.base_encoder.table += 1
    model(*next(views()), 0.9)
    for name in ("mask", "table", "switch"):
        assert torch.equal(getattr(model.momentum_encoder, name), getattr(model.base_encoder, name))


def test_numbers_of_numpy():
    model = build(K=np.int64(64), m=np.float32(0.9), T=np.float64(0.1))
    assert [type(value) for value in (model.K, model.m, model.T)] == [int, float, float]
    with pytest.raises(TypeError, match="K must be an integer, got bool"):
        build(K=np.bool_(True))


@pytest.mark.parametrize("cls", [moco_fast.MoCo, builder.MoCo])
def test_pickles_and_saved_models(cls):
    model = build(cls)
    batches = list(views(count=3))
    model(*batches[0])
    saved = io.BytesIO()
    torch.save(model, saved)
    copies = [
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(saved.getvalue()), weights_only=False),
        copy.deepcopy(model),
    ]
    want = [model.loss(*batch) for batch in batches[1:]]
    for copied in copies:
        for batch in batches[1:]:
            copied(*batch)  # logits that are thrown away
        assert len(getattr(copied, "_snapshots", ())) == 0
        assert torch.equal(copied.queue, model.queue)
    for copied in (copy.deepcopy(build(cls)), pickle.loads(pickle.dumps(build(cls)))):
        copied(*batches[0])
        assert [copied.loss(*batch) for batch in batches[1:]] == want


def test_a_checkpoint_ends_a_step_that_has_begun():
    model, batches = build(), list(views(count=3))
    model.accumulation_steps = 2
    state = copy.deepcopy(model.state_dict())
    model.loss(*batches[0])
    model.load_state_dict(state)
    for batch in batches[1:]:
        model.loss(*batch)
    assert int(model.queue_ptr) == 24


def test_data_parallel_is_refused_in_training():
    """Its replicas are thrown away with what they have learned."""
    three = moco_fast.MoCo_ResNet(TinyNet, 16, 24, 0.3)
    for model, extra in ((build(), ()), (build(builder.MoCo), ()), (three, (0.9,))):
        with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
            model._replicate_for_data_parallel()(*next(views()), *extra)
        model.eval()._replicate_for_data_parallel()(*next(views()), *extra)


def test_a_forward_of_official_methods_leaves_the_ema_to_the_optimizer():
    found = []
    for cls in (ByHand, moco_fast.MoCo):
        model = build(cls)
        optimizer = moco_fast.SGD(model.parameters(), lr=0.1, ema=model.move_ema_into_step(), m=0.9)
        for batch in views(count=3):
            optimizer.zero_grad()
            from_logits(model, *batch).backward()
            optimizer.step()
        found.append(list(model.encoder_k.parameters()))
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="splits=3 must divide the batch, got 8"):
        build(ByHand, bn_splits=3)(*next(views(8)))
