"""Whose a run folder is, and what a run that goes on keeps."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import STEPS, TINY, assert_same_run, run

from moco_fast.cli import main
from moco_fast.train import checkpoint
from moco_fast.train.config import PretrainConfig
from moco_fast.train.display import Display
from moco_fast.train.loop import pretrain
from moco_fast.train.record import Recorder
from moco_fast.train.run import FolderLock, differences, resume_or_begin


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def test_restart_goes_on_with_the_recipe_that_was_fitted(tmp_path):
    """A queue of 4,096 does not suit 1,437 digits; a restart is given the same arguments again."""
    config = replace(TINY, queue_size=4096, epochs=1, bn_splits=1)
    first = run(tmp_path / "run", config, resume="auto")
    again = run(tmp_path / "run", config, resume="auto")
    assert first.step == again.step == 5


def test_differences_are_those_of_the_options_that_both_have():
    now = {
        "lr": 0.1,
        "new": 1,
        "augment": {"gray_p": 0.1, "gray_first": False},
        "second": None,
        "size": (1, 2),
    }
    then = {"lr": 0.2, "old": 1, "augment": {"gray_p": 0.2}, "second": {"gray_p": 0.2}, "size": [1, 2]}
    second = "second=None, was {'gray_p': 0.2}"
    assert differences(now, then) == f"lr=0.1, was 0.2; augment.gray_p=0.1, was 0.2; {second}"
    assert differences(now, then, ["lr", "new", "gone"]) == "lr=0.1, was 0.2"
    assert differences(now, then, []) == ""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def copied(unbroken, tmp_path):
    """A run folder that a test may change."""
    shutil.copytree(unbroken[0], tmp_path / "copy")
    return tmp_path / "copy"


def age(folder):
    """Take from a run folder what older versions did not write."""
    saved = checkpoint.read(folder)
    for name in ("steps_per_epoch", "collapse"):
        del saved["moco_fast"][name]
    checkpoint.write_atomic(folder / checkpoint.FILE_NAME, saved)
    config = json.loads((folder / "config.json").read_text())
    del config["begun"]
    (folder / "config.json").write_text(json.dumps(config))


def test_restart_of_another_run_is_refused_like_its_start(unbroken, monkeypatch):
    """torchrun starts again what was refused: neither its config nor its name makes the folder its own."""
    folder, before = unbroken[0], contents(unbroken[0])
    with pytest.raises(FileExistsError) as refused:
        run(folder)
    other = replace(TINY, lr=0.5)
    for config, launch in ((other, None), (TINY, "another"), (other, "another")):
        with monkeypatch.context() as patch, pytest.raises(FileExistsError) as again:
            if launch:
                patch.setenv("TORCHELASTIC_RUN_ID", launch)
            run(folder, config, resume="restart")
        assert str(again.value) == str(refused.value)
    assert contents(folder) == before
    assert run(folder, resume="restart").step == STEPS  # its own


def test_restarted_command_refuses_a_run_of_others(copied, monkeypatch, capsys):
    before = contents(copied)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["pretrain", "--data", "digits", "--method", "simsiam", "--out", str(copied)]) == 1
    assert f"out '{copied}' is not empty: resume it" in capsys.readouterr().err
    assert contents(copied) == before


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_torchrun_and_slurm_restart_runs(monkeypatch, count):
    for value, resume in (("0", False), ("1", "restart"), ("2", "restart")):
        monkeypatch.setenv(count, value)
        assert resume_or_begin(None, Path("runs/v2")) == resume
    assert resume_or_begin(Path("runs/v2"), None) is True


def test_restart_of_a_run_that_left_no_checkpoint_begins_anew(unbroken, tmp_path, monkeypatch):
    advance = Display.advance

    def die(self, step):
        advance(self, step)
        if step == 2:
            raise MemoryError("killed")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Display, "advance", die)
        run(folder)
    assert not (folder / "checkpoint.pth").exists()
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match="is not empty: choose another"):
        patch.setenv("TORCHELASTIC_RUN_ID", "another")
        run(folder, resume="restart")
    run(folder, resume="restart")
    assert_same_run(folder, unbroken[0], after=-1)


def test_auto_is_for_runs_that_were_asked_for_the_same(copied):
    before = contents(copied)
    with pytest.raises(FileExistsError, match=r"asked for something else \(lr=0\.5, was 0\.06\): resume it"):
        run(copied, replace(TINY, lr=0.5), resume="auto")
    assert contents(copied) == before
    run(copied, replace(TINY, epochs=3), resume=True)  # by hand, which is then what it was asked for
    assert run(copied, replace(TINY, epochs=3), resume="auto").step == 15
    with pytest.raises(FileExistsError, match=r"\(epochs=2, was 3\)"):
        run(copied, resume="auto")


def test_overrides_of_a_resume_outlive_a_restart(copied, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["pretrain", "--resume", str(copied), "--epochs", "3"]) == 0
    saved = checkpoint.read(copied)["moco_fast"]
    assert saved["step"] == 15 and saved["config"]["epochs"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be that of the checkpoint in .*, 'sgd', got 'adamw'"),
        ({"optimizer": "lars"}, "optimizer must be that of the checkpoint in .*, 'sgd', got 'lars'"),
        (
            {"batch_size": 128},
            "batch_size=128, was 256: an epoch would have 11 steps, .* has done 10 of epochs of 5",
        ),
        ({"batch_size": 512}, "batch_size=512, was 256: an epoch would have 2 steps, .* 10 of epochs of 5"),
    ],
)
def test_what_a_run_keeps(copied, changes, message):
    before = contents(copied)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        run(copied, replace(TINY, epochs=3, **changes), resume=True)
    assert contents(copied) == before


def test_other_images_in_place_of_those_trained_on(tmp_path):
    (tmp_path / "photos").mkdir()
    config = replace(TINY, data=str(tmp_path / "photos"), bn_splits=1)
    for i in range(4):
        Image.new("RGB", (9, 9), (60 * i, 50, 0)).save(tmp_path / "photos" / f"{i}.png")
    used = run(tmp_path / "run", config).step
    assert used == 4
    for i in range(4, 8):
        Image.new("RGB", (9, 9), (20 * i, 50, 0)).save(tmp_path / "photos" / f"{i}.png")
    fitted = PretrainConfig.from_dict(checkpoint.read(tmp_path / "run")["moco_fast"]["config"])
    with pytest.raises(checkpoint.CheckpointError, match="other images: an epoch would have 4 steps"):
        run(tmp_path / "run", replace(fitted, epochs=3), resume=True)
    (tmp_path / "photos").rename(tmp_path / "moved")
    for i in range(4, 8):
        (tmp_path / "moved" / f"{i}.png").unlink()
    moved = replace(fitted, epochs=3, data=str(tmp_path / "moved"))
    assert run(tmp_path / "run", moved, resume=True).step == 6


def test_runs_of_older_versions_go_on(copied):
    age(copied)
    assert run(copied, resume="auto").step == STEPS
    assert run(copied, replace(TINY, epochs=3), resume=True).step == 15


def test_a_run_goes_on_whose_views_were_drawn_on_a_gpu(copied):
    """A GPU's generator has a state of 16 bytes, which a CPU's cannot take over."""
    saved = checkpoint.read(copied)
    saved["moco_fast"]["views"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.write_atomic(copied / checkpoint.FILE_NAME, saved)
    assert run(copied, replace(TINY, epochs=3), resume=True).step == 15


def test_config_is_written_whole(copied, monkeypatch):
    before = contents(copied)

    def cut(self, text):
        with open(self, "w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_text", cut)
        run(copied, replace(TINY, epochs=3), resume=True)
    assert contents(copied) == before


def test_a_folder_that_another_process_writes_to(tmp_path):
    """It is refused before anything is written, and free again when that process is gone."""
    holder = "import sys\nfrom pathlib import Path\nfrom moco_fast.train.run import FolderLock\n"
    holder += "FolderLock().take(Path(sys.argv[1]))\nprint('taken', flush=True)\nsys.stdin.read()"
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(FileExistsError, match="is being written by another process"):
            run(out, TINY)
        assert not any(out.iterdir())
        other.stdin.close()
        other.wait(60)
    assert run(out, TINY).step == run(out, TINY, resume=True).step


def test_what_has_changed_is_told(tmp_path, capsys):
    def resumed(**changes):
        pretrain(replace(TINY, **changes), tmp_path / "run", resume=True)
        return capsys.readouterr().out.replace("\n", " ")

    run(tmp_path / "run", TINY)
    assert re.search(r"other options: .*weight_decay=0.5, was", resumed(epochs=3, weight_decay=0.5))
    with pytest.raises(checkpoint.CheckpointError, match=r"epochs must be at least 3.*got 2"):
        resumed()
    with pytest.raises(checkpoint.CheckpointError, match="batch_size=250, was 256"):
        resumed(epochs=4, batch_size=250, bn_splits=2)
    saved = checkpoint.read(tmp_path / "run")
    saved["moco_fast"]["classes"] = ["a", "b"]
    checkpoint.write_atomic(tmp_path / "run" / "checkpoint.pth", saved)
    assert "images are not those that the run has trained on: classes=" in resumed(epochs=4)
    del saved["moco_fast"]["views"]
    checkpoint.write_atomic(tmp_path / "run" / "checkpoint.pth", saved)
    with pytest.raises(checkpoint.CheckpointError, match="lacks views"):
        resumed(epochs=4)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_records_that_cannot_be_written_end_no_run(tmp_path):
    """TensorBoard's folder is removed, the metrics are damaged: told, and that is all."""
    run(tmp_path / "run", TINY)
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(bytes(range(128, 256)))
    assert run(tmp_path / "run", replace(TINY, epochs=3), resume=True).step
    told = []
    recorder = Recorder(tmp_path / "run", 1, told.append)
    recorder._file.close()
    recorder._file = full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    recorder.write(2, loss=1.0)
    assert full.closed
    recorder.write(3, loss=1.0)
    recorder.close()
    assert len(told) == 1 and "gets no more records" in told[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # this process has threads; the child uses none
def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    """It may live some seconds longer than a run that was killed, which torchrun starts again at once."""
    ready, tell_ready = os.pipe()
    end, tell_end = os.pipe()
    with FolderLock() as lock:
        lock.take(tmp_path)
        if not (child := os.fork()):
            os.write(tell_ready, b"x")
            os.read(end, 1)
            os._exit(0)
    try:
        os.read(ready, 1)
        with FolderLock() as again:
            again.take(tmp_path)
    finally:
        os.write(tell_end, b"x")
        os.waitpid(child, 0)
        for descriptor in (ready, tell_ready, end, tell_end):
            os.close(descriptor)
