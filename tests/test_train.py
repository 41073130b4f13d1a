"""The trainer: resuming bit for bit, ending cleanly, refusing NaN, and what a run folder holds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from training import STEPS, TINY, assert_same_run, metrics, run

import moco_fast
from moco_fast.data.augment import AugmentConfig
from moco_fast.train import checkpoint
from moco_fast.train.build import choose_device
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display
from moco_fast.train.loop import pretrain
from moco_fast.train.meter import NonFiniteLossError
from moco_fast.train.presets import PRESETS, moved_to, preset_for
from moco_fast.train.schedule import learning_rate


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def test_run_folder(unbroken):
    folder, outcome = unbroken
    assert outcome.step == STEPS and outcome.interrupted is None
    assert list(outcome.accuracy) == ["raw pixels", "random init", "trained"]
    assert all(0 < value <= 1 for value in outcome.accuracy.values())
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint.pth", "config.json", "metrics.jsonl", "tensorboard", "curves.png", "neighbours.png"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dataset").startswith("scikit-learn")
    assert config.pop("begun") == {"launch": None, "asked": config}
    assert PretrainConfig.from_dict(config) == TINY

    rows = metrics(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "knn" in row] == [4, 8, STEPS]
    for row in rows:
        if "loss" in row:
            assert row["chance_loss"] == pytest.approx(np.log(513))
            assert -1 <= row["neg_sim"] <= 1 and -1 <= row["pos_sim"] <= 1 and 0 <= row["acc1"] <= 1
        if "loss" in row:
            assert row["lr"] == learning_rate(TINY, row["step"] - 1, 5)
    group = checkpoint.read(folder)["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (TINY.sgd_momentum, TINY.weight_decay)
    fills = [row["queue_fill"] for row in rows if "loss" in row]
    assert fills[:3] == [0.5, 1.0, 1.0]
    for picture in ("curves.png", "neighbours.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10


def test_checkpoint_is_official(unbroken):
    """The keys, names and order that official scripts read, and nothing that needs pickle."""
    folder, _ = unbroken
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert list(saved)[:4] == ["epoch", "arch", "state_dict", "optimizer"]
    assert saved["epoch"] == 2 and saved["arch"] == "small_resnet"
    names = list(saved["state_dict"])
    assert names[:2] == ["module.queue", "module.queue_ptr"]
    assert {
        "module.encoder_q.fc.0.weight",
        "module.encoder_q.fc.2.bias",
        "module.encoder_k.conv1.weight",
    } <= set(names)
    assert saved["state_dict"]["module.queue"].shape == (16, 512)
    assert saved["state_dict"]["module.queue_ptr"].item() == STEPS * 256 % 512
    frozen_too = len(saved["optimizer"]["param_groups"][0]["params"])
    assert frozen_too == sum(1 for n in names if n.endswith(("weight", "bias")))


@pytest.mark.parametrize(
    ("stop_at", "by"), [(1, signal.SIGTERM), (5, signal.SIGINT), (7, signal.SIGHUP)], ids=str
)
def test_stop_and_resume_is_bit_equal(unbroken, tmp_path, monkeypatch, stop_at, by):
    advance = Display.advance

    def advance_and_stop(self, step):
        advance(self, step)
        if step == stop_at:
            os.kill(os.getpid(), by)

    ignored = signal.signal(by, signal.SIG_DFL)  # as SIGHUP is under nohup, and stays then
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Display, "advance", advance_and_stop)
            stopped = run(tmp_path / "run")
    finally:
        signal.signal(by, ignored)
    assert stopped.interrupted == by and stopped.step == stop_at
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == stop_at
    torch.manual_seed(999)  # whatever happened to the generators in between
    np.random.seed(999)  # noqa: NPY002
    assert run(tmp_path / "run", resume=True).step == STEPS
    assert_same_run(tmp_path / "run", unbroken[0])


def test_resume_drops_records_past_the_checkpoint(unbroken, tmp_path, monkeypatch):
    """A run that dies without a word at step 8 goes on from its checkpoint of step 6."""
    advance = Display.advance

    def die(self, step):
        advance(self, step)
        if step == 8:
            raise MemoryError("killed")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Display, "advance", die)
        run(tmp_path / "run")
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == 6
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 7
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken[0])


def test_resume_of_a_finished_run_changes_nothing(unbroken):
    folder, outcome = unbroken
    before = metrics(folder)
    again = run(folder, resume=True)
    assert again.accuracy == outcome.accuracy and again.step == STEPS
    assert metrics(folder) == before


def test_handlers_are_restored(unbroken):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_killed_process_resumes_to_the_same_end(unbroken, tmp_path, number):
    """A real process, killed as soon as it has a checkpoint; then resumed to the end."""
    folder = tmp_path / "run"
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from test_train import TINY, Console, pretrain\n"
        "end = pretrain(TINY, Path(sys.argv[1]), resume=len(sys.argv) > 2, console=Console())\n"
        "sys.exit(128 + end.interrupted if end.interrupted else 0)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    done = checkpoint.read(folder)["moco_fast"]["step"]
    assert done >= 3
    stopped = process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    # It may have reached the end before the signal did, and be drawing pictures.
    assert stopped or (done == STEPS and process.returncode in (0, -number)), output
    assert f"saved step {done}" in output or number == signal.SIGKILL or done == STEPS
    assert subprocess.run([*command, "resume"], capture_output=True, timeout=240).returncode == 0
    assert_same_run(folder, unbroken[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_step_and_keeps_the_checkpoint(unbroken, tmp_path, monkeypatch, bad):
    forward = moco_fast.MoCo.forward
    calls = []

    def poisoned(self, *views, **options):
        loss, stats = forward(self, *views, **options)
        calls.append(1)
        return (loss * bad if len(calls) == 5 else loss), stats

    with (
        monkeypatch.context() as patch,
        pytest.raises(NonFiniteLossError, match=r"step 5 .*lr too high.*last good"),
    ):
        patch.setattr(moco_fast.MoCo, "forward", poisoned)
        run(tmp_path / "run", replace(TINY, log_every=4))  # noticed at the record of step 8, named as 5
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == 4
    run(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken[0], after=4)


def test_non_finite_weights_are_not_saved(tmp_path, monkeypatch):
    step_of = moco_fast.SGD.step
    calls = []

    def poison_last(self):
        step_of(self)
        calls.append(1)
        if len(calls) == 6:  # after the loss of step 6 was computed, and just before its checkpoint
            self.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(moco_fast.SGD, "step", poison_last)
    with pytest.raises(NonFiniteLossError, match=r"step 6 \(weights: encoder_q.conv1.weight must be finite"):
        run(tmp_path)
    assert checkpoint.read(tmp_path)["moco_fast"]["step"] == 4


def test_existing_run_is_not_overwritten(unbroken):
    with pytest.raises(FileExistsError, match="is not empty: resume it"):
        run(unbroken[0])


def test_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose another --out"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_prolonged_run_uses_the_new_values_and_measures_again(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    outcome = run(tmp_path / "run", replace(TINY, epochs=3, weight_decay=0.01, sgd_momentum=0.5), resume=True)
    assert outcome.step == 15
    group = checkpoint.read(tmp_path / "run")["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)
    last = [row["knn"] for row in metrics(tmp_path / "run") if row["step"] == 15 and "knn" in row]
    assert last == [outcome.accuracy["trained"]]


def test_bf16_autocast_learns(tmp_path):
    # Of 16 pixels, so that the last layer does not get maps of one: docs/numerics.md.
    config = replace(TINY, bf16=True, epochs=1, augment=AugmentConfig(image_size=16))
    outcome = run(tmp_path, config)
    assert outcome.step == 5 and all(np.isfinite(row["loss"]) for row in metrics(tmp_path) if "loss" in row)


def test_folder_without_labels(tmp_path):
    """Ten grey and colour pictures of odd sizes: trains without kNN, says why, and draws neighbours."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(10):
        shape = (20 + 7 * i, 30, 3) if i % 2 else (33, 20 + 5 * i)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    console = Console(record=True, width=200)
    config = replace(TINY, data=str(tmp_path / "photos"), epochs=2, bn_splits=1)
    outcome = pretrain(config, tmp_path / "run", console=console)
    text = console.export_text()
    assert outcome.accuracy == {} and "No kNN accuracy: the images have no class labels" in text
    assert "batch_size 256 -> 5, queue_size 512 -> 5" in text
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["config"]["augment"]["image_size"] == 8
    assert outcome.step == 4 and (tmp_path / "run" / "neighbours.png").exists()


def test_fallback_to_digits_brings_its_recipe(tmp_path, monkeypatch):
    from moco_fast.data import datasets

    monkeypatch.setattr(datasets.fashion_mnist, "find", lambda log: None)
    monkeypatch.setattr(datasets.fashion_mnist, "fetch", lambda log: None)
    config = replace(PRESETS["fashion-mnist"].config, epochs=1, width=8)
    run(tmp_path, config)
    used = checkpoint.read(tmp_path)["moco_fast"]["config"]
    assert used["data"] == "digits" and used["augment"]["image_size"] == 8
    assert used["epochs"] == 1 and used["width"] == 8


def test_presets():
    for name, preset in PRESETS.items():
        read = PretrainConfig.from_dict(json.loads(json.dumps(preset.config.to_dict())))
        assert read == preset.config, name
    assert preset_for("digits") == "digits" and preset_for("some/photos") == "folder"
    moved = moved_to(replace(PRESETS["fashion-mnist"].config, lr=0.5), "digits")
    assert moved == replace(PRESETS["digits"].config, lr=0.5)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.5), (99, 0.5 * (1 + np.cos(np.pi * 89 / 90)))],
)
def test_cosine_schedule(step, rate):
    config = replace(TINY, lr=1.0, epochs=10, warmup_epochs=1.0)
    assert learning_rate(config, step, 10) == pytest.approx(rate)


def test_rate_is_scaled_to_the_batch():
    for batch, want in ((256, 1.0), (512, 2.0), (64, 0.25)):
        config = replace(TINY, lr=1.0, batch_size=batch, schedule="step", milestones=(1,))
        assert learning_rate(config, 0, 10) == pytest.approx(want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "milestones must be above 0 and below epochs=2 .*, got 120 160"),
        ({"milestones": (1,)}, r"schedule 'cosine' does not use milestones, got \(1,\)"),
    ],
)
def test_milestones_that_a_run_would_not_meet(tmp_path, changes, message):
    config = replace(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists() and PretrainConfig.from_dict(config.to_dict()) == config


def test_a_second_view_of_a_size_that_the_network_cannot_take(tmp_path):
    config = replace(TINY, arch="small_vit", augment_second=AugmentConfig(image_size=16))
    with pytest.raises(ValueError, match="arch 'small_vit' cannot take images of image_size=16 pixels"):
        run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_step_schedule():
    config = replace(TINY, lr=1.0, epochs=10, schedule="step", milestones=(3, 6))
    assert [learning_rate(config, s, 10) for s in (0, 29, 30, 59, 60)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize("warmup", [0.01, 0.25, 0.3, 1.7])
def test_warmup_never_passes_the_peak(warmup):
    config = replace(TINY, lr=1.0, epochs=10, warmup_epochs=warmup)
    rates = [learning_rate(config, step, 10) for step in range(100)]
    assert max(rates) <= 1 and rates[int(warmup * 10)] > 0.9


def test_two_images_are_enough(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (100 * i, 50, 0)).save(tmp_path / "photos" / f"{i}.png")
    assert run(tmp_path / "run", replace(TINY, data=str(tmp_path / "photos"), bn_splits=1)).step == 2
    with pytest.raises(ValueError, match=r"at most 2 images cannot be cut into 8 shares \(bn_splits=8\)"):
        config = replace(TINY, data=str(tmp_path / "photos"), bn_splits=8)
        run(tmp_path / "other", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 2.0}, "warmup_epochs must be below epochs=2, got 2.0"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"batch_size": 1024}, "batch_size must be at most queue_size=512, got 1024"),
        ({"bn_splits": 3}, "bn_splits=3 must divide batch_size=256"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"schedule": "linear"}, "schedule must be one of 'cosine', 'step', got 'linear'"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        replace(TINY, **changes)


def test_the_chosen_gpu_is_the_current_one(monkeypatch):
    """Whose random state is saved, restored and forked."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: chosen.append("used"))
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1"), "used"]  # before anything makes a context on another
    assert choose_device("cuda") == torch.device("cuda") and choose_device("cpu") == torch.device("cpu")
    assert chosen[2:] == ["used"] * 2
