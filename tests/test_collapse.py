"""The collapse alarm: its statistics against their definitions, and when it speaks."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from moco_fast.data.augment import AugmentConfig
from moco_fast.train.collapse import PATIENCE, CollapseAlarm, EmbeddingWatch, embedding_stats, grace
from moco_fast.train.config import PretrainConfig
from moco_fast.train.loop import pretrain


def plain(z):
    unit = F.normalize(z.double(), dim=1)
    covariance = (unit - unit.mean(0)).T @ (unit - unit.mean(0)) / len(z)
    values = torch.linalg.eigvalsh(covariance)
    spread = (1 - unit.mean(0).square().sum()).clamp(min=0).sqrt()
    return spread.item(), (values.sum() ** 2 / values.square().sum()).item()


@pytest.mark.parametrize("shape", [(64, 16), (7, 33), (257, 5)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_statistics_are_their_definitions(shape, shift):
    z = torch.randn(shape) + shift
    found = embedding_stats(z)
    assert (found["spread"].item(), found["rank"].item()) == pytest.approx(plain(z), rel=1e-4)


def test_extremes():
    point = embedding_stats(torch.ones(8, 4) * torch.arange(1, 9)[:, None])
    assert point["spread"] < 1e-3 and torch.isfinite(point["rank"])
    line = embedding_stats(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]).repeat(8, 1))
    assert line["spread"].item() == pytest.approx(1) and line["rank"].item() == pytest.approx(1)
    isotropic = embedding_stats(torch.eye(8).repeat(2, 1) - 1 / 8)
    assert isotropic["rank"].item() == pytest.approx(7, rel=1e-4)


def test_watch_takes_training_outputs_only():
    encoder = nn.Linear(3, 2)
    watch = EmbeddingWatch(encoder)
    encoder.eval()(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="not been called in training"):
        watch.stats()
    x = torch.randn(4, 3)
    out = encoder.train()(x)
    found = watch.stats()
    assert found["spread"] == embedding_stats(out)["spread"] and not found["spread"].requires_grad


def test_alarm_waits_then_tells_once_and_forgets():
    alarm = CollapseAlarm()
    assert alarm.look(10, 0.9, 20.0) is None and alarm.since is None
    assert alarm.look(20, 0.01, 20.0) is None and alarm.since == 20
    assert alarm.look(20 + PATIENCE - 1, 0.01, 20.0) is None
    said = alarm.look(20 + PATIENCE, 0.01, 20.0)
    assert "COLLAPSE at step 70" in said and "in one point" in said
    assert alarm.look(20 + PATIENCE + 10, 0.01, 20.0) is None
    assert alarm.look(100, 0.9, 20.0) is None and alarm.since is None
    alarm.look(110, 0.9, 1.0)
    assert "on one line" in alarm.look(110 + PATIENCE, 0.9, 1.0)


def test_fresh_networks_are_not_judged():
    assert [grace(total, 11, 256) for total in (20, 1100, 10_000)] == [2, 110, 200]
    assert grace(1_000_000, 5004, 256) == 5004 and grace(1000, 10, rows=2) == 1000
    alarm = CollapseAlarm(grace=100)
    for step in range(10, 101, 10):
        assert alarm.look(step, 0.01, 1.0) is None and alarm.since is None
    assert alarm.look(110, 0.01, 9.0) is None and alarm.since == 110


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_simsiam_collapses_without_its_stop_gradient(stop_gradient, tmp_path):
    config = PretrainConfig(
        data="digits", epochs=20, warmup_epochs=0.5, width=8, knn_every=10**9, knn_bank=500, threads=1,
        augment=AugmentConfig(8, (0.4, 1.0), jitter=(0.8, 0.8, 0.0, 0.0), gray_p=0.0, blur_p=0.0),
    )  # fmt: skip
    config = replace(config.with_method("simsiam"), dim=64, pred_dim=16, stop_gradient=stop_gradient)
    console = Console(record=True, width=200)
    outcome = pretrain(config, tmp_path / "run", console=console)
    text = console.export_text()
    assert outcome.collapsed == (not stop_gradient) and ("COLLAPSE at step" in text) == (not stop_gradient)
    better = outcome.accuracy["trained"] - outcome.accuracy["random init"]
    assert better > 0.05 if stop_gradient else better < 0.05


def test_two_classes_lie_on_a_line():
    alarm = CollapseAlarm(by_rank=False)
    assert all(alarm.look(step, 0.99, 1.0) is None for step in range(0, 10 * PATIENCE, 10))
    assert alarm.since is None and not alarm.told


def test_a_resumed_run_knows_of_its_collapse(tmp_path, monkeypatch):
    monkeypatch.setattr("moco_fast.train.collapse.SPREAD", 2.0)  # whatever the embeddings do
    config = PretrainConfig(
        data="digits", epochs=2, batch_size=256, width=8, dim=16, queue_size=512, log_every=1, knn_bank=200,
        knn_every=10**9, threads=1, warmup_epochs=0.0, augment=AugmentConfig(image_size=8),
    )  # fmt: skip
    quiet = Console(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("moco_fast.train.collapse.PATIENCE", 8)
        assert pretrain(config, tmp_path / "told", console=quiet).collapsed
        assert pretrain(config, tmp_path / "told", resume=True, console=quiet).collapsed
    monkeypatch.setattr("moco_fast.train.collapse.PATIENCE", 12)
    assert not pretrain(config, tmp_path / "run", console=quiet).collapsed  # of 10 steps
    longer = replace(config, epochs=3)
    assert pretrain(longer, tmp_path / "run", resume=True, console=quiet).collapsed
