"""The table of methods: every one trains, resumes and is evaluated; what it does not use it refuses."""

import json
from dataclasses import fields, replace

import pytest
import torch
from rich.console import Console

from moco_fast.commands import run as command
from moco_fast.data.augment import AugmentConfig
from moco_fast.train import checkpoint
from moco_fast.train.collapse import RANK, SPREAD
from moco_fast.train.config import OPTIONS, PretrainConfig
from moco_fast.train.loop import pretrain
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS
from moco_fast.train.pretrained import load_pretrained

TINY = PretrainConfig(
    data="digits", epochs=1, batch_size=256, width=8, dim=16, log_every=1, knn_every=10**9, knn_bank=200,
    knn_queries=50, augment=AugmentConfig(image_size=8), threads=1, warmup_epochs=0.0, lr=0.02,
    lr_batch_size=256,
)  # fmt: skip
SMALL = {"queue_size": 512, "mlp_dim": 32, "pred_dim": 16, "prototypes": 64}


def tiny(method, **changes):
    small = {name: value for name, value in SMALL.items() if name in METHODS[method].options}
    return replace(TINY.with_method(method), **({"dim": 16} | small | changes))


def run(config, folder, **options):
    return pretrain(config, folder, console=Console(quiet=True), **options)


def variants():
    for method, row in METHODS.items():
        yield method, {}
        yield from ((method, {name: True}) for name in ("symmetric", "nce") if name in row.options)


@pytest.mark.parametrize(("method", "changes"), variants(), ids=lambda value: str(value))
def test_every_method_trains_and_resumes_bit_for_bit(method, changes, tmp_path):
    config = tiny(method, **changes)
    outcome = run(config, tmp_path / "run")
    assert outcome.step == 5 and 0 < outcome.accuracy["trained"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 5 and all(row["spread"] > SPREAD and row["rank"] > RANK for row in rows)
    assert all(-1.001 <= row["pos_sim"] <= 1.001 for row in rows if "pos_sim" in row)

    run(replace(config, epochs=2), tmp_path / "longer")
    # The schedule knows the length of the run: the shorter one is stopped, not ended.
    half = replace(config, epochs=2, checkpoint_every=3)
    with pytest.MonkeyPatch.context() as patch:
        from moco_fast.train.display import Display

        advance = Display.advance

        def stop(self, step):
            advance(self, step)
            if step == 5:
                raise KeyboardInterrupt

        patch.setattr(Display, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            run(half, tmp_path / "broken")
    run(half, tmp_path / "broken", resume=True)
    want, got = (checkpoint.read(tmp_path / name)["state_dict"] for name in ("longer", "broken"))
    assert list(want) == list(got)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name

    pretrained = load_pretrained(tmp_path / "run")
    assert pretrained.method == method
    assert pretrained.backbone(torch.zeros(2, 1, 8, 8)).shape == (2, pretrained.width)


def other_value(name):
    values = {"shuffle": True, "queue_sync": "local", "symmetric": True, "nce": True, "stop_gradient": True}
    return values.get(
        name, True if name == "freeze_patch" else 0.5 if "temp" in name or name == "momentum" else 8
    )


@pytest.mark.parametrize("method", METHODS)
def test_options_that_a_method_does_not_use_are_refused(method):
    unused = [name for name in OPTIONS if name not in METHODS[method].options]
    assert unused
    for name in unused:
        with pytest.raises(ValueError, match=rf"method '{method}' does not use {name}, got {name}="):
            PretrainConfig(method=method, **{name: other_value(name)})


def test_every_option_is_a_field_and_has_a_user():
    names = {f.name for f in fields(PretrainConfig)}
    assert set(OPTIONS) <= names
    for name in OPTIONS:
        assert any(name in row.options for row in METHODS.values()), name
    for method, row in METHODS.items():
        assert set(row.options) <= set(OPTIONS), method
        assert set(row.recipe) <= names - set(OPTIONS), method


def test_a_refused_option_on_the_command_line(capsys, tmp_path):
    out = str(tmp_path / "run")
    assert command(["pretrain", "--method", "simsiam", "--queue-size", "64", "--out", out]) == 1
    assert "method 'simsiam' does not use queue_size, got queue_size=64" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.in_batch])
def test_negatives_of_the_batch_are_not_cut_silently(method):
    with pytest.raises(
        ValueError, match="takes its negatives from the batch, which accumulation=2 would cut"
    ):
        tiny(method, accumulation=2)


def test_labels_are_asked_for(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(64):
        Image.new("L", (9, 9), 4 * i).save(tmp_path / "photos" / f"{i}.png")
    with pytest.raises(ValueError, match="method 'sup-moco' needs class labels, and the images have none"):
        run(tiny("sup-moco", data=str(tmp_path / "photos"), batch_size=16), tmp_path / "run")


def test_a_checkpoint_of_another_method(tmp_path):
    run(tiny("simclr"), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"method must be that of the checkpoint .*'simclr'"):
        run(tiny("simsiam"), tmp_path, resume=True)


def test_with_method_resets_what_is_the_methods_own():
    config = PretrainConfig(queue_size=64, batch_size=32)
    other = config.with_method("simsiam")
    assert other.queue_size is None and other.batch_size == 32 and other.stop_gradient is True
    assert other.with_method("moco-v2").queue_size == METHODS["moco-v2"].options["queue_size"]
    assert config.with_method("moco-v2") is config
    with pytest.raises(ValueError, match="method must be one of"):
        config.with_method("byol")


def test_presets_command(capsys):
    assert command(["presets"]) == 0
    out = capsys.readouterr().out
    for name in (*PRESETS, *METHODS):
        assert name[:12] in out
