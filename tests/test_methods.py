"""The table of methods: every one trains, resumes and is evaluated; what it does not use it refuses."""

import contextlib
import json
import math
from dataclasses import fields, replace

import pytest
import ranks
import torch
from rich.console import Console

from moco_fast.data.augment import AugmentConfig
from moco_fast.train import checkpoint
from moco_fast.train.collapse import RANK, SPREAD
from moco_fast.train.config import OPTIONS, PretrainConfig
from moco_fast.train.loop import pretrain
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS
from moco_fast.train.pretrained import load_pretrained

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

from moco_fast.commands import run as command

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


@pytest.mark.parametrize(("method", "changes"), list(variants()), ids=lambda value: str(value))
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


def test_a_memory_bank_of_before_its_generator_was_saved_goes_on(tmp_path):
    config = tiny("memory-bank")
    run(config, tmp_path)
    saved = checkpoint.read(tmp_path)
    assert saved["moco_fast"].pop("negatives") is not None
    checkpoint.write_atomic(tmp_path / checkpoint.FILE_NAME, saved)
    assert run(replace(config, epochs=2), tmp_path, resume=True).step == 10


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


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.undivided])
def test_batches_are_not_cut_silently(method):
    with pytest.raises(ValueError, match="which accumulation=2 would cut into parts"):
        tiny(method, accumulation=2)


def test_labels_are_asked_for(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(64):
        Image.new("L", (9, 9), 4 * i).save(tmp_path / "photos" / f"{i}.png")
    with pytest.raises(ValueError, match="method 'sup-moco' needs class labels, and the images have none"):
        run(tiny("sup-moco", data=str(tmp_path / "photos"), batch_size=16), tmp_path / "run")


def test_a_checkpoint_of_another_method(tmp_path, capsys):
    run(tiny("simclr"), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"method must be that of the checkpoint .*'simclr'"):
        run(tiny("simsiam"), tmp_path, resume=True)
    assert command(["pretrain", "--resume", str(tmp_path), "--method", "simsiam"]) == 1
    assert "method must be that of the checkpoint" in capsys.readouterr().err


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="freeze_patch needs a vision transformer"):
        tiny("moco-v3", freeze_patch=True)
    with pytest.raises(ValueError, match="method 'memory-bank' has one view of an image"):
        tiny("memory-bank", augment_second=AugmentConfig(image_size=8))
    with pytest.raises(ValueError, match=r"optimizer 'adamw' does not use sgd_momentum, got 0\.5"):
        tiny("simclr", optimizer="adamw", sgd_momentum=0.5)


@pytest.mark.parametrize(
    ("method", "changes", "want"),
    [
        ("moco-v2", {}, math.log(513)),
        ("moco-v2", {"symmetric": True}, 2 * math.log(513)),
        ("memory-bank", {}, math.log(513)),
        ("memory-bank", {"nce": True}, math.log1p(512) + 512 * math.log1p(1 / 512)),
        ("simclr", {}, math.log(511)),
        ("end-to-end", {}, math.log(256)),
        ("moco-v3", {}, 4 * 0.2 * math.log(256)),
    ],
)
def test_loss_of_guessing(method, changes, want):
    config = tiny(method, **changes)
    assert METHODS[method].chance(config) == pytest.approx(want)


def test_a_method_keeps_what_the_recipe_chose():
    recipe = PRESETS["moco-v2"].config
    v1 = recipe.with_method("moco-v1")
    assert (v1.queue_size, v1.momentum, v1.temperature) == (65536, 0.999, 0.07)
    cifar = PRESETS["cifar10-200"].config.with_method("moco-v2")
    assert (cifar.bn_splits, cifar.temperature) == (8, 0.1)
    assert PretrainConfig().with_method("simsiam").with_method("moco-v2") == PretrainConfig()


class Stop(Exception):
    pass


def rank_resuming(rank, folder):
    """Buffers of the queue at the end of a run, and when it is resumed."""
    from moco_fast.train import loop

    seen, replicated = [], loop.replicated

    def watched(model, *rest):
        seen.append(model)
        if len(seen) == 2:
            raise Stop
        return replicated(model, *rest)

    loop.replicated = watched
    config = tiny("sup-moco", queue_sync="local")
    run(config, folder)
    with contextlib.suppress(Stop):
        run(replace(config, epochs=2), folder, resume=True)
    return [{name: b for name, b in model.named_buffers() if name.startswith("queue")} for model in seen]


def test_every_rank_gets_its_own_queue_and_labels_back(tmp_path):
    found = ranks.run(2, rank_resuming, tmp_path / "run", folder=tmp_path)
    for ended, resumed in found:
        assert set(ended) == {"queue", "queue_ptr", "queue_labels"}
        for name, value in ended.items():
            assert torch.equal(value, resumed[name]), name
    assert not torch.equal(found[0][0]["queue_labels"], found[1][0]["queue_labels"])


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
