"""Fine-tuning: that it learns, resumes bit for bit, and says what it cannot do."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from test_train_processes import finish, torchrun

from moco_fast.cli import main
from moco_fast.data.augment import AugmentConfig
from moco_fast.data.datasets import load_dataset
from moco_fast.data.fraction import labelled_fraction
from moco_fast.data.images import Dataset, ImageSet, MemoryImages
from moco_fast.evaluate.scores import confusion
from moco_fast.models.backbones import backbone
from moco_fast.train import checkpoint, pretrained
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display
from moco_fast.train.finetune import finetune
from moco_fast.train.finetune_config import FinetuneConfig
from moco_fast.train.layers import parameter_groups
from moco_fast.train.loop import pretrain
from moco_fast.train.meter import NonFiniteLossError
from moco_fast.train.pretrained import load_pretrained
from moco_fast.train.schedule import cosine

Image = pytest.importorskip("PIL.Image")

TINY = FinetuneConfig(
    epochs=2, batch_size=64, lr=0.1, lr_batch_size=64, log_every=5, checkpoint_every=10, threads=1,
    label_smoothing=0.1, flip_p=0.0,
)  # fmt: skip
STEPS = 44  # 1,437 digits in batches of 64, twice
TIMED = {"images_per_s", "data_wait"}


def write_pretrained(path, arch="small_resnet", data="digits"):
    """What pretraining on digits would leave, but for the training."""
    torch.manual_seed(5)
    network = backbone(arch, width=8, in_channels=1, image_size=8)(num_classes=16)
    config = PretrainConfig(data=data, arch=arch, width=8, dim=16, augment=AugmentConfig(image_size=8))
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    extras = {"config": config.to_dict(), "channels": 1, "mean": [0.3], "std": [0.4]}
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "optimizer": {}, "moco_fast": extras}, path)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_pretrained(tmp_path_factory.mktemp("start") / "checkpoint.pth")


def run(folder, config=TINY, **options):
    return finetune(config, folder, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, run(folder, checkpoint=start)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def test_it_learns_and_leaves_a_run_folder(unbroken):
    folder, outcome = unbroken
    assert (outcome.step, outcome.interrupted, outcome.images) == (STEPS, None, 1437)
    scores = outcome.scores
    assert scores.acc1 > 0.3 and scores.acc5 > max(0.6, scores.acc1)  # chance: 0.1 and 0.5
    assert scores.confusion.sum() == 360
    assert scores.confusion.diagonal().sum() / 360 == pytest.approx(scores.acc1)
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pth", "config.json", "metrics.jsonl", "tensorboard", "curves.png", "confusion.png"
    }  # fmt: skip
    rows = metrics(folder)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses[-1] < losses[0] < 2.5
    assert [row["step"] for row in rows if "test_acc1" in row] == [22, 44]
    assert rows[-1]["test_acc1"] == scores.acc1 and rows[-1]["test_loss"] == scores.loss
    assert rows[0]["lr"] == cosine(0.1, 2, 0.2, 4, 22)  # of the last step before the record


def test_the_checkpoint_is_that_of_the_scores(unbroken):
    """Logits of the file, computed here, give the scores; its backbone can be evaluated like any other."""
    folder, outcome = unbroken
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    network = backbone("small_resnet", width=8, in_channels=1)(num_classes=10).eval()
    state = {name.removeprefix("module.encoder."): value for name, value in saved["state_dict"].items()}
    network.load_state_dict(state)
    test = load_dataset("digits").test
    images = (test.images.pixels / 255 - 0.3) / 0.4
    with torch.no_grad():
        logits = network(images)
    predicted = logits.argmax(1)
    assert (confusion(predicted, test.labels, 10) - outcome.scores.confusion).abs().sum() <= 2
    assert F.cross_entropy(logits, test.labels).item() == pytest.approx(outcome.scores.loss, rel=1e-3)
    loaded = load_pretrained(folder)
    assert (loaded.method, loaded.width, loaded.data) == ("moco-v2, fine-tuned", 64, "digits")
    assert torch.equal(loaded.backbone(images[:9]), network.features(images[:9]))


@pytest.mark.parametrize("stop_at", [7, 22])
def test_stop_and_resume_is_bit_equal(start, unbroken, tmp_path, monkeypatch, stop_at):
    advance = Display.advance

    def advance_and_stop(self, step):
        advance(self, step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", advance_and_stop)
        stopped = run(tmp_path / "run", checkpoint=start)
    assert stopped.interrupted == signal.SIGTERM and stopped.step == stop_at and stopped.scores is None
    torch.manual_seed(999)  # whatever happened to the generators in between
    ended = run(tmp_path / "run", resume=True)
    assert ended.step == STEPS and ended.scores.loss == unbroken[1].scores.loss
    # The record at the stop cuts a mean in two; those after it, and all accuracies, are the same.
    mine, wanted = (
        [r for r in metrics(path) if r["step"] > stop_at + 5] for path in (tmp_path / "run", unbroken[0])
    )
    assert mine == wanted
    a, b = checkpoint.read(tmp_path / "run"), checkpoint.read(unbroken[0])
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for index, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])


def test_restart_goes_on_where_there_is_a_checkpoint(start, tmp_path):
    config = replace(TINY, epochs=1, labels_fraction=0.1)
    first = run(tmp_path / "run", config, checkpoint=start, resume="auto")
    before = metrics(tmp_path / "run")
    again = run(tmp_path / "run", config, checkpoint=start, resume="auto")
    assert first.step == again.step == 2 and metrics(tmp_path / "run") == before
    assert first.scores.loss == again.scores.loss


def test_restart_of_another_run_is_refused_like_its_start(start, unbroken, tmp_path, monkeypatch):
    folder = unbroken[0]
    before = (folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes()
    other = write_pretrained(tmp_path / "other.pth")
    with pytest.raises(FileExistsError) as refused:
        run(folder, checkpoint=start)
    for config, begin in ((replace(TINY, lr=0.2), start), (TINY, other)):
        with pytest.raises(FileExistsError) as again:
            run(folder, config, checkpoint=begin, resume="restart")
        assert str(again.value) == str(refused.value)
    with pytest.raises(FileExistsError, match=r"asked for something else \(checkpoint="):
        run(folder, checkpoint=other, resume="auto")
    assert before == ((folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes())
    assert run(folder, checkpoint=start, resume="restart").step == STEPS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be that of the checkpoint in .*, 'sgd', got 'adamw'"),
        ({"batch_size": 32}, "batch_size=32, was 64: an epoch would have 44 steps, .* 44 of epochs of 22"),
        ({"labels_fraction": 0.5}, "labels_fraction must be that of the checkpoint in .*, 1.0, got 0.5"),
        ({"from_scratch": True}, "from_scratch must be that of the checkpoint in .*, False, got True"),
    ],
)
def test_what_a_run_keeps(unbroken, changes, message):
    folder = unbroken[0]
    before = (folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=message):
        run(folder, replace(TINY, epochs=3, **changes), resume=True)
    assert before == ((folder / "checkpoint.pth").read_bytes(), (folder / "config.json").read_bytes())


def test_what_else_a_run_keeps(start, tmp_path):
    """The seed, where it chooses the labels, and the classes; another rate is told of."""
    config = replace(TINY, epochs=1, labels_fraction=0.5)
    run(tmp_path / "run", config, checkpoint=start)
    with pytest.raises(checkpoint.CheckpointError, match=r"seed must be that of the checkpoint .*, 0, got 1"):
        run(tmp_path / "run", replace(config, epochs=2, seed=1), resume=True)
    saved = checkpoint.read(tmp_path / "run")
    names = saved["moco_fast"]["class_names"]
    saved["moco_fast"]["class_names"] = names[::-1]
    checkpoint.write_atomic(tmp_path / "run" / checkpoint.FILE_NAME, saved)
    with pytest.raises(checkpoint.CheckpointError, match="data must have the classes that the run"):
        run(tmp_path / "run", replace(config, epochs=2), resume=True)
    saved["moco_fast"]["class_names"] = names
    checkpoint.write_atomic(tmp_path / "run" / checkpoint.FILE_NAME, saved)
    console = Console(record=True, width=200)
    finetune(replace(config, epochs=2, lr=0.01), tmp_path / "run", resume=True, console=console)
    assert "Resumed with other options: epochs=2, was 1; lr=0.01, was 0.1" in console.export_text()


def test_a_checkpoint_is_there_before_an_epoch_is_measured(start, tmp_path, monkeypatch):
    """Which can take longer than whoever ends the run waits; what was not measured is measured then."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moco_fast.train.finetune._evaluate", killed)
        run(tmp_path / "run", checkpoint=start)
    assert checkpoint.read(tmp_path / "run")["moco_fast"]["step"] == STEPS // TINY.epochs
    run(tmp_path / "run", resume=True)
    assert sum("test_acc1" in row for row in metrics(tmp_path / "run")) == TINY.epochs


def test_pretraining_does_not_resume_it(unbroken, tmp_path, capsys):
    folder = unbroken[0]
    assert main(["pretrain", "--resume", str(folder)]) == 1
    said = f"{folder} is a fine-tuning run: resume it with moco-fast finetune --resume {folder}"
    assert said in capsys.readouterr().err
    with pytest.raises(checkpoint.CheckpointError, match="is a fine-tuning run"):
        pretrain(PretrainConfig(data="digits"), folder, resume=True, console=Console(quiet=True))


def test_finetuning_does_not_resume_a_pretrained_run(start, capsys):
    assert main(["finetune", "--resume", str(start)]) == 1
    assert "is not a fine-tuning run" in capsys.readouterr().err


def test_resume_of_a_finished_run_measures_it_again(unbroken):
    folder, outcome = unbroken
    before = metrics(folder)
    again = run(folder, resume=True)
    assert again.step == STEPS and again.scores.loss == outcome.scores.loss
    assert metrics(folder) == before


def test_from_scratch_begins_with_other_weights(start, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "moco_fast.train.finetune.parameter_groups",
        lambda model, *more: (
            seen.append(model.encoder.conv1.weight.detach().clone()) or parameter_groups(model, *more)
        ),
    )
    short = replace(TINY, epochs=1, labels_fraction=0.1)
    run(tmp_path / "a", short, checkpoint=start)
    run(tmp_path / "b", replace(short, from_scratch=True), checkpoint=start)
    loaded = load_pretrained(start)
    assert torch.equal(seen[0], loaded.backbone.conv1.weight)
    assert torch.equal(seen[1], loaded.fresh().conv1.weight) and not torch.equal(*seen)
    assert load_pretrained(tmp_path / "b").method == "supervised"


def test_one_label_in_fifty(start, tmp_path, capsys):
    """The batch shrinks to what there is, and only the chosen images are seen."""
    labels = load_dataset("digits").train.labels
    chosen = labelled_fraction(labels, 0.02, 7)
    config = replace(TINY, epochs=3, labels_fraction=0.02, seed=7)
    outcome = finetune(config, tmp_path / "run", checkpoint=start)
    assert outcome.images == len(chosen) < 40 and outcome.step == 3
    assert f"{len(chosen)} training images: batch_size 64 -> {len(chosen)}" in capsys.readouterr().out


def test_two_processes_train_as_one(tmp_path):
    """A transformer, whose normalisation does not depend on who else is in the batch."""
    write_pretrained(tmp_path / "vit.pth", "small_vit")
    config = FinetuneConfig(
        optimizer="adamw",
        layer_decay=0.7,
        epochs=1,
        batch_size=256,
        threads=1,
        log_every=1,
        warmup_epochs=0.0,
    )
    run(tmp_path / "one", config, checkpoint=tmp_path / "vit.pth")
    options = [
        str(tmp_path / "vit.pth"), "--optimizer", "adamw", "--layer-decay", "0.7", "--epochs", "1",
        "--batch-size", "256", "--threads", "1", "--log-every", "1", "--warmup-epochs", "0",
    ]  # fmt: skip
    program = ("-m", "moco_fast.cli", "finetune")
    output = finish(torchrun(2, tmp_path / "two", *options, program=program))
    assert output.count("Run folder:") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=3e-3)


def test_non_finite_loss_ends_the_run(start, tmp_path):
    with pytest.raises(NonFiniteLossError, match="not finite at step"):
        run(tmp_path / "run", replace(TINY, lr=1e30, warmup_epochs=0.0), checkpoint=start)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_fraction": 0.0}, r"labels_fraction must be in \(0, 1\], got 0"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1"),
        ({"optimizer": "lamb"}, "optimizer must be one of 'sgd', 'adamw', got 'lamb'"),
        ({"warmup_epochs": 5}, "warmup_epochs must be below epochs=5, got 5"),
        ({"lr": float("nan")}, "lr must be finite and at least 0"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must satisfy"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


def test_config_round_trip():
    config = replace(TINY, data="digits", optimizer="adamw")
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.peak_lr, config.decay) == (0.1, 0.05) and FinetuneConfig().peak_lr == 0.1
    with pytest.raises(ValueError, match="has no colour; it was written by another version"):
        FinetuneConfig.from_dict({"colour": 1})


def test_what_cannot_be_started(start, unbroken, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="either a checkpoint to start from or resume"):
        run(tmp_path / "run")
    with pytest.raises(FileExistsError, match="is not empty: resume it"):
        run(unbroken[0], checkpoint=start)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(tmp_path / "run", checkpoint=tmp_path / "nothing")
    with pytest.raises(checkpoint.CheckpointError, match="is not a fine-tuning run"):
        run(start.parent, resume=True)
    probe = {"state_dict": {"module.fc.weight": torch.zeros(10, 64), "module.fc.bias": torch.zeros(10)}}
    torch.save(probe | {"epoch": 1, "arch": "small_resnet", "optimizer": {}}, tmp_path / "linear.pth")
    with pytest.raises(checkpoint.CheckpointError, match="holds a classifier"):
        run(tmp_path / "run", checkpoint=tmp_path / "linear.pth")
    images = ImageSet(MemoryImages(torch.zeros(9, 1, 8, 8, dtype=torch.uint8)), None)
    monkeypatch.setattr(pretrained, "load_dataset", lambda *_, **__: Dataset("photos", images, None, (), ""))
    with pytest.raises(ValueError, match="data 'photos' cannot be learned: the images have no class labels"):
        run(tmp_path / "run", checkpoint=start)
    assert not (tmp_path / "run").exists()


def test_commands(start, tmp_path, capsys):
    folder = str(tmp_path / "run")
    small = ["--epochs", "1", "--batch-size", "256", "--threads", "1", "--out", folder]
    assert main(["finetune", str(start), *small]) == 0
    out = capsys.readouterr().out
    assert "pretrained" in out and "1,437" in out and "confusion.png" in out
    assert main(["finetune", "--resume", folder, "--epochs", "2"]) == 0
    saved = checkpoint.read(folder)["moco_fast"]
    assert saved["step"] == 10 and saved["finetune"]["batch_size"] == 256
    capsys.readouterr()
    assert main(["map", folder, "--points", "40", "--out", str(tmp_path / "map.png")]) == 0
    assert "40 images of digits" in capsys.readouterr().out
    for name in ("map.png", "neighbours.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400
    for arguments, message in [
        (["finetune"], "give either a checkpoint"),
        (["finetune", folder, "--resume", folder], "give either a checkpoint"),
        (["finetune", "--resume", folder, "--out", "x"], "out must be left out with --resume"),
        (["map", "no/run"], "no checkpoint at no/run"),
        (["map", folder, "--points", "0"], "points must be at least 5, got 0"),
    ]:
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith("moco-fast: ") and message in err
