"""The command line, as its users type it."""

import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from PIL import Image

import moco_fast
from moco_fast import backends
from moco_fast.data import download
from moco_fast.extras import extra
from moco_fast.models.backbones import ANY_CHANNELS
from moco_fast.train import checkpoint
from moco_fast.train.presets import PRESETS

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

from moco_fast import commands
from moco_fast.cli import main

TINY = ["pretrain", "--data", "digits", "--epochs", "1", "--width", "8", "--dim", "16", "--knn-bank", "200"]
TINY += ["--threads", "1"]  # faster at this size


def test_pretrain_then_knn_then_resume(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main([*TINY, "--out", folder]) == 0
    out = capsys.readouterr().out
    assert re.search(r"trained +│ +\d+\.\d+%", out) and "Checkpoint and pictures" in out
    step = checkpoint.read(folder)["moco_fast"]["step"]

    assert main(["knn", folder, "--bank", "200"]) == 0
    out = capsys.readouterr().out
    assert "200 images vote, 360 are queries" in out
    rows = dict(re.findall(r"│ (raw pixels|random init|trained) +│ +([\d.]+)%", out))
    want = checkpoint.read(folder)["moco_fast"]["accuracy"]
    assert {name: float(value) for name, value in rows.items()} == {
        n: round(100 * v, 2) for n, v in want.items()
    }

    assert main(["pretrain", "--resume", folder, "--dim", "8"]) == 1
    err = capsys.readouterr().err
    assert (
        "dim=8, was 16: a run continues with the model that it has trained" in err and "queue is (16, " in err
    )

    assert main(["pretrain", "--resume", folder, "--epochs", "2"]) == 0
    assert checkpoint.read(folder)["moco_fast"]["step"] == 2 * step
    saved = checkpoint.read(folder)["moco_fast"]
    assert saved["config"]["width"] == 8  # the run's own config, not the preset's
    capsys.readouterr()
    assert main(["knn", folder + "/checkpoint.pth", "--bank", "200"]) == 0
    assert f"{saved['accuracy']['trained']:.2%}" in capsys.readouterr().out


def test_a_second_view_of_its_own(tmp_path):
    out = str(tmp_path / "run")
    assert main([*TINY, "--augment.gray-p", "0.1", "--augment-second.blur-p", "0.7", "--out", out]) == 0
    config = checkpoint.read(out)["moco_fast"]["config"]
    assert config["augment"]["gray_p"] == 0.1 and config["augment_second"]["blur_p"] == 0.7
    assert config["augment"]["blur_p"] != 0.7


def test_a_directory_with_the_name_of_a_dataset(tmp_path, monkeypatch):
    """``./digits`` is the directory, with the recipe of directories; the run remembers where it is."""
    for label in "ab":
        (tmp_path / "digits" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (20, 20), (50 * i, 9, 9)).save(tmp_path / "digits" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "1", "--width", "8", "--dim", "16", "--threads", "1"]
    assert main(["pretrain", "--data", "./digits", "--out", "run", *small]) == 0
    config = checkpoint.read("run")["moco_fast"]["config"]
    assert config["augment"]["image_size"] == 64 and config["data"] == str(tmp_path / "digits")
    monkeypatch.chdir("run")
    assert main(["pretrain", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--data", "nowhere/at/all"], "nowhere/at/all"),
        (
            ["pretrain", "--data", "digits", "--arch", "resnet51"],
            "arch 'resnet51' is unknown; close are: resnet",
        ),
        (
            ["pretrain", "--data", "digits", "--arch", "vit_b_32"],
            "arch 'vit_b_32' cannot take images of image_size=8 pixels",
        ),
        (["pretrain", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["pretrain", "--temperature", "nan"], "temperature must be finite and above 0, got nan"),
        (["pretrain", "--resume", "no/run"], "no checkpoint at no/run"),
        (["knn", "no/run"], "no checkpoint at no/run"),
        (["pretrain", "--data", "digits", "--device", "foo"], "device 'foo' cannot be used"),
        (["pretrain", "--data", "digits", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["pretrain", "--seed", "99999999999999999999999"], "seed must be below 2**63"),
        (["pretrain", "--data", "fashion-mnst"], "did you mean fashion-mnist?"),
    ],
)
def test_faults_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("moco-fast: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["pretrain", "--epoch", "3"], "--epochs"),
        (["pretrain", "--augment.blurp", "3"], "--augment.blur-p"),
        (["pretrain", "--preset", "cifar"], "fashion-mnist"),
        (["pretrian"], "pretrain"),
    ],
)
def test_unknown_options_say_what_is_close(arguments, hint, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert hint in captured.out + captured.err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "moco-fast pretrain --data photos/ --epochs 50" in out and "moco-fast doctor" in out
    assert "moco-fast convert runs/NAME backbone.pth --to torchvision" in out


def test_preset_choices_are_the_presets():
    choice = get_type_hints(commands.Pretrain)["preset"]
    assert get_args(get_args(choice)[0]) == tuple(PRESETS)


def test_help_names_every_backbone(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    out = capsys.readouterr().out
    for arch in ANY_CHANNELS:
        assert f'"{arch}"' in out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for row in ("native kernels", "CPU instructions", "GPU", "torchvision"):
        assert row in out
    served = {op for backend in backends.BACKENDS.values() for op in getattr(backend, "OPS", ())}
    assert served >= {"info_nce", "take_rows", "split_batch_norm", "sgd_", "dino"}
    for op in served:
        assert f" {op} on cpu " in out


def test_doctor_tells_what_a_forced_backend_cannot(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MOCO_FAST_BACKEND", "triton")
    assert main(["doctor"]) == 0
    out = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert (
        "forced: triton" in out and "info_nce on cpu none: backend 'triton' was asked for, but cannot" in out
    )


def test_missing_extra_is_named():
    """Without tyro the command says what to install."""
    program = (
        "import sys; sys.modules['tyro'] = None; from moco_fast.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install '.[train]' in a checkout of moco_fast" in done.stderr


def test_missing_torchvision_is_named(monkeypatch, tmp_path):
    """The package is on no index: advice to install it by name would fetch whatever has that name there."""
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[train]' in a checkout" in download.with_torchvision("CIFAR10", tmp_path, 1)
    with pytest.raises(ImportError, match=r"nothing_at_all is needed here .*: pip install '.\[train\]' in a"):
        extra("nothing_at_all")


def test_doctor_without_the_extra(monkeypatch, capsys):
    """It tells what is missing, also that its own table is."""
    monkeypatch.setitem(sys.modules, "moco_fast.commands", None)
    monkeypatch.delattr(moco_fast, "commands")
    assert main(["doctor"]) == 2
    told = capsys.readouterr()
    assert re.search(r"^torchvision: ", told.out, re.MULTILINE) and "backend: " in told.out
    assert "Install what it needs with: pip install" in told.err
