"""Images that a run can have no longer: the command says why, and the last checkpoint stays."""

import multiprocessing
import os
import signal
import sys

import pytest
from images import write_image
from torch.utils.data import get_worker_info

from moco_fast.data import folder
from moco_fast.data.folder import FolderImages
from moco_fast.train import checkpoint

pytest.importorskip("tyro", reason="tyro is not installed: there is no command line")

from moco_fast.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a run that decodes its images as it goes, and saves every step."""
    monkeypatch.setattr(folder, "MEMORY_BUDGET", 0)
    for i in range(40):
        write_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", (i, i, i))
    run = ["pretrain", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--epochs", "100"]
    size = ["--augment.image-size", "16", "--width", "8", "--dim", "16", "--batch-size", "8"]
    return [*run, *size, "--queue-size", "64", "--checkpoint-every", "1", "--knn-bank", "8", "--threads", "1"]


def check_end(out, capsys, *messages):
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for message in messages:
        assert message in err
    assert not multiprocessing.active_children()
    assert checkpoint.read(out)["moco_fast"]["step"] >= 1


def test_a_worker_that_is_killed(arguments, tmp_path, monkeypatch, capsys):
    """As Linux kills a process for want of memory; the other ones end with the run."""
    fetch = FolderImages.fetch

    def killed(self, indices):
        worker = get_worker_info()
        if worker and worker.id == 0 and (tmp_path / "run" / "checkpoint.pth").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return fetch(self, indices)

    monkeypatch.setattr(FolderImages, "fetch", killed)
    assert main([*arguments, "--workers", "2"]) == 1
    check_end(tmp_path / "run", capsys, "moco-fast: DataLoader worker (pid", "free some, or lower --workers")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_files_that_are_gone(arguments, tmp_path, monkeypatch, capsys, workers):
    """As when their disk is unmounted."""
    decode = folder.decode

    def gone(path, canvas):
        if (tmp_path / "run" / "checkpoint.pth").exists():
            return "No such file or directory"
        return decode(path, canvas)

    monkeypatch.setattr(folder, "decode", gone)
    assert main([*arguments, "--workers", workers]) == 1
    check_end(tmp_path / "run", capsys, "moco-fast: no image can be decoded any more; ", ".png: No such file")
