"""moco.builder by hand: the calls of a training script, wrappers, checkpoints, memory."""

import copy
import io
from functools import partial

import pytest
import ranks
import torch
from largest import Largest
from test_compat_logits import accuracy, true_accuracy
from test_moco import TinyNet, build, from_logits, train, views
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moco_fast
from bench.eager_moco import EagerMoCo
from bench.eager_moco_v3 import EagerMoCoV3
from bench.memory import CLEAR_REFS, peak_extra
from moco_fast.compat import builder, lazy, optimizer, vits

silent = pytest.mark.filterwarnings("error:moco_fast.compat")


@pytest.fixture(autouse=True)
def _first_note(monkeypatch):
    monkeypatch.setattr(lazy, "_noted", False)


@silent
@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_twenty_steps_equal_the_official_semantics(mlp):
    want_model, model = build(EagerMoCo, mlp=mlp), build(builder.MoCo, mlp=mlp)
    assert str(model) == str(want_model).replace("EagerMoCo", "MoCo")
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in want_model.named_parameters()]
    initial = want_model.state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())
    want = train(want_model, from_logits)
    torch.testing.assert_close(train(model, from_logits), want, rtol=1e-5, atol=0)
    assert (model.K, model.m, model.T) == (64, 0.9, 0.1)


@silent
def test_no_logits_in_memory():
    model = build(builder.MoCo, K=4096)
    with Largest() as largest:
        for im_q, im_k in views(64, 2):
            output, target = model(im_q=im_q, im_k=im_k)
            nn.CrossEntropyLoss()(output, target).backward()
            accuracy(output, target)
    assert largest.elements < 64 * 4096


def rank_memory(rank):
    """Growth of the resident size by a step whose logits would take 64 MB, in a process of its own."""
    ((im_q, im_k),) = views(256)

    def step(model):
        output, target = model(im_q=im_q, im_k=im_k)
        F.cross_entropy(output, target).backward()

    return [peak_extra(partial(step, build(kind, K=65_536))) for kind in (builder.MoCo, EagerMoCo)]


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="this kernel does not tell the peak of the resident size")
def test_resident_memory(tmp_path):
    ((ours, eager),) = ranks.run(1, rank_memory, folder=tmp_path)
    logits = 256 * 65_537 * 4
    assert eager > 2 * logits and ours < logits / 2


@pytest.mark.filterwarnings("ignore:moco_fast.compat")
def test_true_logits_are_those_of_the_queue_before_the_step():
    model, eager = build(builder.MoCo), build(EagerMoCo)
    for im_q, im_k in views(12, 3):
        outputs = [model(im_q, im_k)[0] for _ in range(9)]  # passes K = 64 slots: every row is overwritten
        for output in outputs:
            torch.testing.assert_close(output + 0, eager(im_q, im_k)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:moco_fast.compat")
def test_a_graph_keeps_the_queue_only_for_true_logits():
    model, eager = build(builder.MoCo), build(EagerMoCo)
    ((im_q, im_k),) = views()
    loss = F.cross_entropy(*model(im_q, im_k))
    assert len(model._snapshots) == 0
    loss.backward()
    model.zero_grad()
    loss = (model(im_q, im_k)[0] ** 2).mean()
    assert len(model._snapshots) == 1
    for _ in range(2):
        model(im_q, im_k)
    loss.backward()
    eager(im_q, im_k)
    (eager(im_q, im_k)[0] ** 2).mean().backward()
    for got, want in zip(model.encoder_q.parameters(), eager.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)


def test_a_replaced_queue_gives_no_wrong_logits():
    model = build(builder.MoCo)
    ((im_q, im_k),) = views()
    output, target = model(im_q, im_k)
    model.load_state_dict(build(builder.MoCo, seed=5).state_dict())
    model(im_q, im_k)
    assert torch.isfinite(F.cross_entropy(output, target))
    with (
        pytest.warns(UserWarning, match="mul needs"),
        pytest.raises(RuntimeError, match="after the queue they follow from had been replaced"),
    ):
        output * 2


@pytest.mark.filterwarnings("ignore:moco_fast.compat")
def test_inference_mode():
    model, eager = build(builder.MoCo).eval(), build(EagerMoCo).eval()
    ((im_q, im_k),) = views()
    with torch.inference_mode():
        output, target = model(im_q, im_k)
        torch.testing.assert_close(torch.cat(accuracy(output, target)), torch.stack(true_accuracy(output)))
        want = F.cross_entropy(*eager(im_q, im_k))
        torch.testing.assert_close(F.cross_entropy(output, target), want, rtol=1e-4, atol=0)


def steps(model, optimizer, batches, loss_of):
    losses = []
    for batch in batches:
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def lars(model):
    return optimizer.LARS(model.parameters(), 0.3, weight_decay=1e-6, momentum=0.9)


def v3(cls, seed=3):
    torch.manual_seed(seed)
    return cls(TinyNet, 16, 32, 1.0)


def v3_loss(model, x1, x2):
    return model(x1, x2, 0.9)


@silent
@pytest.mark.parametrize(
    ("make", "eager", "ours", "optimizer_of", "loss_of"),
    [
        (build, EagerMoCo, builder.MoCo, sgd, from_logits),
        (v3, EagerMoCoV3, builder.MoCo_ResNet, lars, v3_loss),
    ],
    ids=["v2", "v3"],
)
@pytest.mark.parametrize("direction", ["eager to ours", "ours to eager"])
def test_checkpoints_go_both_ways(make, eager, ours, optimizer_of, loss_of, direction):
    """Model and optimizer, saved halfway and resumed by the other: the next losses are the same.

    In float64: in fp32 the two round otherwise, and one activation of 1e-7 on the other side of a ReLU moves
    the losses after it by 1e-4.
    """
    first, second = (eager, ours) if direction == "eager to ours" else (ours, eager)
    batches = [[view.double() for view in batch] for batch in views(12, 20)]
    model = make(first).double()
    opt = optimizer_of(model)
    steps(model, opt, batches[:10], loss_of)
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "optimizer": opt.state_dict()}, file)
    want = steps(model, opt, batches[10:], loss_of)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other = make(second, seed=8).double()
    other.load_state_dict(checkpoint["state_dict"])
    other_opt = optimizer_of(other)
    other_opt.load_state_dict(checkpoint["optimizer"])
    torch.testing.assert_close(steps(other, other_opt, batches[10:], loss_of), want, rtol=1e-9, atol=0)


def rank_wrapped(rank):
    return [
        wrapped(rank, **options) for options in ({}, {"find_unused_parameters": True}, {"static_graph": True})
    ]


def wrapped(rank, **options):
    """Two steps of two parts each under DDP; the last loss asks for true logits as well."""
    lazy._noted = False
    model = build(builder.MoCo)
    model.accumulation_steps = 2
    ddp = DistributedDataParallel(model, **options)
    losses = []
    for im_q, im_k in views(12, 4):
        output, target = ddp(im_q=im_q[rank::2], im_k=im_k[rank::2])
        loss = nn.CrossEntropyLoss()(output, target)
        assert not lazy._noted
        if len(losses) == 3:
            loss = loss + (output * output).mean()
        loss.backward()
        losses.append((loss.item(), torch.stack(accuracy(output, target))))
    return losses, [p.grad.clone() for p in model.encoder_q.parameters()]


def test_wrapped_in_ddp(tmp_path):
    found = ranks.run(2, rank_wrapped, folder=tmp_path)
    for plain, *others in found:
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)
    for (_, gradients), (_, same) in zip(*found, strict=True):
        torch.testing.assert_close(gradients, same, rtol=0, atol=0)


@silent
def test_autocast_and_grad_scaler():
    losses = {}
    for cls in (EagerMoCo, builder.MoCo):
        model = build(cls)
        scaler, opt = torch.amp.GradScaler("cpu", init_scale=2.0**10), sgd(model)
        losses[cls] = []
        for im_q, im_k in views(12, 5):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output, target = model(im_q=im_q, im_k=im_k)
                assert output.dtype == torch.bfloat16
                loss = F.cross_entropy(output.float(), target)
            assert loss.dtype == torch.float32
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            losses[cls].append(loss.item())
    torch.testing.assert_close(losses[builder.MoCo], losses[EagerMoCo], rtol=0.03, atol=0.03)


@silent
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_compiled():
    want = train(build(builder.MoCo), from_logits, steps=5)
    compiled = train(torch.compile(build(builder.MoCo), backend="eager"), from_logits, steps=5)
    torch.testing.assert_close(compiled, want, rtol=1e-5, atol=0)

    @torch.compile(backend="eager")
    def loss_of(model, im_q, im_k):
        output, target = model(im_q=im_q, im_k=im_k)
        return F.cross_entropy(output, target)

    torch.testing.assert_close(train(build(builder.MoCo), loss_of, steps=5), want, rtol=1e-5, atol=0)


@silent
def test_accumulated_gradients():
    """Two halves of a batch, one step: the mean of their losses."""
    eager, model = build(EagerMoCo), build(builder.MoCo)
    for im_q, im_k in views(12, 3):
        for each in (eager, model):
            each.zero_grad()
            for half in (slice(6), slice(6, 12)):
                output, target = each(im_q[half], im_k[half])
                (F.cross_entropy(output, target) / 2).backward()
        for got, want in zip(model.encoder_q.parameters(), eager.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-6)


@silent
def test_eval_copies_and_the_fused_call():
    model, eager = build(builder.MoCo), build(EagerMoCo)
    ((im_q, im_k),) = views()
    output, target = model(im_q, im_k)
    copied = copy.deepcopy(model)
    assert len(model._snapshots) == 1 and len(copied._snapshots) == 0
    true, _ = eager(im_q, im_k)
    torch.testing.assert_close(torch.cat(accuracy(output, target)), torch.stack(true_accuracy(true)))
    before = model.queue.clone()
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(F.cross_entropy(*model(im_q, im_k)))
    assert torch.equal(before, model.queue)
    assert model.loss(im_q, im_k).ndim == 0 and isinstance(model, moco_fast.MoCo)


def test_names_of_v3():
    assert builder.MoCo_ResNet is moco_fast.MoCo_ResNet and builder.MoCo_ViT is moco_fast.MoCo_ViT
    assert optimizer.LARS is moco_fast.LARS
    for name in ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base"):
        assert callable(vits.__dict__[name])
