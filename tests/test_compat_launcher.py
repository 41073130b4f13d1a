"""``python -m moco_fast.compat``: imports answered here and in spawned processes, arguments, errors."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from moco_fast.compat import builder, loader

SCRIPTS = Path(__file__).parent / "scripts"


def launch(*arguments, cwd=None):
    command = [sys.executable, "-m", "moco_fast.compat", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_spawned_processes_find_the_same_modules(tmp_path):
    """Ours, those that only the script's folder has, and none of the working directory."""
    (tmp_path / "moco").mkdir()
    (tmp_path / "moco" / "builder.py").write_text("raise ImportError('the wrong one')")
    (tmp_path / "moco" / "extra.py").write_text("from moco.builder import MoCo, concat_all_gather")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "decoy.py").touch()
    for name in ("spawned.py", "networks.py"):
        (tmp_path / name).write_text((SCRIPTS / name).read_text())
    done = launch("--device", "cpu:2", "../spawned.py", tmp_path, "--device=own", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"moco_fast answers for moco/builder.py in {tmp_path}" in done.stderr.splitlines()[0]
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    for each in found:
        assert each["extra"] == str(tmp_path / "moco" / "extra.py") and not each["decoy"]
        assert each["gathered"] == [0, 1]
        homes = ("compat.builder", "compat.loader", "optim", "compat.vits")
        assert [home.removeprefix("moco_fast.") for home in each["homes"]] == [
            home if home != "optim" else "compat.optimizer" for home in homes
        ]
        assert each["arguments"] == [str(tmp_path), "--device=own"]
        assert each["device"] == "cpu" and each["logits"] == "Logits" and each["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such.py"], "no such script: no_such.py"),
        ([], "the following arguments are required: SCRIPT;"),
        (["--devise", "cpu", "script.py"], "unrecognized arguments: --devise"),
        (["--device", "tpu", "script.py"], "argument --device: must be cpu or cpu:COUNT, got 'tpu'"),
        (["--device", "cpu:0", "script.py"], "argument --device: must be cpu or cpu:COUNT, got 'cpu:0'"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    from moco_fast.compat import launcher

    try:
        status = launcher.main(arguments)
    except SystemExit as left:
        status = left.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("python -m moco_fast.compat: ")
    assert message in lines[0]


def test_help_shows_examples(capsys):
    from moco_fast.compat import launcher

    with pytest.raises(SystemExit, match="0"):
        launcher.main(["--help"])
    text = capsys.readouterr().out
    assert "main_moco.py -a resnet50" in text and "--device cpu" in text and "torchrun" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_script_for_gpus_is_told_that_there_is_none(tmp_path):
    """Official scripts spawn a process per GPU: here none, and that would be all."""
    script = tmp_path / "spawns.py"
    script.write_text("")
    assert "no GPU found; --device cpu before the script" in launch(script).stderr
    assert launch("--device", "cpu", script).stderr == ""


def test_a_failing_script_fails(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, moco.builder\nassert os.path.abspath(sys.argv[0]) == __file__\nsys.exit(7)"
    )
    done = launch(script.name, cwd=tmp_path)
    assert done.returncode == 7, done.stderr


def test_importing_moco_fast_imports_none_of_it():
    program = "import sys, moco_fast, moco_fast.compat; moco_fast.MoCo; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("moco_fast.compat.")]


def picture():
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=numpy.uint8))


def test_gathering_without_a_process_group():
    x = torch.ones(3, requires_grad=True)
    alone = builder.concat_all_gather(x)
    assert torch.equal(alone, x) and not alone.requires_grad


def test_two_views():
    image = picture()
    assert loader.TwoCropsTransform(lambda x: x.size)(image) == [(9, 9), (9, 9)]
    assert loader.TwoCropsTransform(lambda x: 1, lambda x: 2)(image) == [1, 2]


def test_solarize_and_blur():
    image = picture()
    values = torch.from_numpy(numpy.array(image))
    got = torch.from_numpy(numpy.array(loader.Solarize()(image)))
    assert torch.equal(got, torch.where(values >= 128, 255 - values, values))
    random.seed(3)
    first, second = (numpy.array(loader.GaussianBlur()(image)) for _ in range(2))
    random.seed(3)
    assert (numpy.array(loader.GaussianBlur([0.1, 2.0])(image)) == first).all() and (first != second).any()
    with pytest.raises(
        ValueError, match=r"sigma must be two numbers with 0 <= least <= largest, got \[2, 1\]"
    ):
        loader.GaussianBlur([2, 1])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 256\], got 300"):
        loader.Solarize(300)
