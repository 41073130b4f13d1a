"""``moco-fast knn``: this library's checkpoints and official ones, several k, several processes."""

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest
import ranks
import torch
from PIL import Image

import moco_fast
from moco_fast.models.backbones import backbone
from moco_fast.train import checkpoint
from moco_fast.train.build import build_model
from moco_fast.train.config import PretrainConfig
from moco_fast.train.methods import Facts

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

from moco_fast.commands import run


def save(path, model, config=None, **changes):
    """An untrained run's checkpoint, or an official file."""
    state = {"epoch": 0, "arch": "resnet18", "state_dict": checkpoint.model_state(model), "optimizer": {}}
    if config is not None:
        extras = {"config": config.to_dict(), "channels": 1, "mean": [0.3], "std": [0.4]}
        state |= {"arch": config.arch, "moco_fast": extras}
    checkpoint.write_atomic(path, state | changes)
    return str(path)


@pytest.fixture
def untrained(tmp_path):
    config = PretrainConfig(data="digits", width=8, dim=16, queue_size=64, batch_size=32)
    config = replace(config, augment=replace(config.augment, image_size=8))
    return save(tmp_path / "c.pth", build_model(config, 1, Facts(100, 10)), config)


def test_several_k_and_json(untrained, tmp_path, capsys):
    out = tmp_path / "knn"
    assert run(["knn", untrained, "--k", "1", "20", "--bank", "200", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1 nearest neighbour, weighted" in shown and "20 nearest neighbours, weighted" in shown
    accuracy = json.loads((out / "results.json").read_text())["knn"]
    assert list(accuracy) == ["1", "20"] and list(accuracy["20"]) == ["raw pixels", "random init", "trained"]
    assert accuracy["20"]["random init"] == accuracy["20"]["trained"]
    assert accuracy["20"]["raw pixels"][0] > 0.8
    first, five = accuracy["1"]["trained"]
    assert first == five < accuracy["20"]["trained"][1]  # one neighbour has one class
    rows = re.findall(r"│ raw pixels +│ +([\d.]+)%", shown)
    assert [float(row) for row in rows] == [round(100 * accuracy[k]["raw pixels"][0], 2) for k in ("1", "20")]
    assert run(["knn", untrained, "--k", "1", "--bank", "200", "--temperature", "None"]) == 0
    shown = capsys.readouterr().out
    assert "1 nearest neighbour " in shown and "weighted" not in shown


def test_official_file(tmp_path, capsys):
    model = moco_fast.MoCo(backbone("resnet18", width=8), 16, 64)
    path = save(tmp_path / "official.pth.tar", model)
    assert run(["knn", path, "--data", "digits", "--image-size", "32", "--bank", "200"]) == 0
    assert "360 are queries" in capsys.readouterr().out
    assert run(["knn", path]) == 1
    err = capsys.readouterr().err
    assert "data must be given" in err and "does not say what it was trained on" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "201", "--bank", "200"], "k must be at most the 200 images of the bank, got 201"),
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be finite and above 0, got 0"),
        (["--bank", "0"], "bank must be at least 1"),
        (["--data", "fashion-mnst"], "did you mean fashion-mnist?"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_errors(untrained, capsys, arguments, message):
    assert run(["knn", untrained, *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("moco-fast: ") and message in err and err.count("\n") == 1


def test_images_without_labels_and_of_colour(untrained, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (50 * i, 9, 9)).save(tmp_path / "photos" / f"{i}.png")
    assert run(["knn", untrained, "--data", str(tmp_path / "photos")]) == 1
    assert "has 3 channels, the checkpoint's encoder takes 1" in capsys.readouterr().err
    model = moco_fast.MoCo(backbone("resnet18", width=8), 16, 64)
    path = save(tmp_path / "official.pth", model)
    assert run(["knn", path, "--data", str(tmp_path / "photos"), "--image-size", "32"]) == 1
    assert "cannot be measured: the images have no class labels" in capsys.readouterr().err


def test_the_official_test_view_and_others(tmp_path, capsys):
    """0.875 of the side for files at 224 pixels, unless told otherwise; both commands write it down."""
    for i in range(12):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 9, 9)).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    model = moco_fast.MoCo(backbone("resnet18", width=8), 16, 64)
    path = save(tmp_path / "official.pth", model)
    of = ["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    knn = ["knn", path, "--k", "1", *of]
    linear = ["linear", path, "--epochs", "1", "--no-baselines", *of]

    def crop(arguments):
        assert run([*arguments, "--workers", "0"]) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())["crop"]

    assert crop(knn) == crop(linear) == 0.875
    assert torch.load(tmp_path / "out" / "linear.pth", weights_only=True)["moco_fast"]["crop"] == 0.875
    assert crop([*knn, "--image-size", "32"]) == 1.0
    assert crop([*knn, "--image-size", "32", "--crop", "0.5"]) == 0.5
    assert crop([*linear, "--image-size", "32", "--augment", "--crop", "0.875"]) == 0.875
    assert run([*knn, "--crop", "1.5"]) == 1 and "crop must be in (0, 1], got 1.5" in capsys.readouterr().err


def measured(rank, path, out):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = run(["knn", path, "--k", "5", "20", "--out", out, "--device", "cpu"])
    return status, shown.getvalue()


def test_two_processes_measure_what_one_does(untrained, tmp_path):
    torch.set_num_threads(1)
    status, shown = measured(0, untrained, str(tmp_path / "by-1"))
    assert status == 0
    results = ranks.run(2, measured, untrained, str(tmp_path / "by-2"), folder=tmp_path)
    assert results == [(0, shown.replace("by-1", "by-2")), (0, "")]
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("by-1", "by-2"))
    assert one == two
