"""Checkpoints survive any death of the process, and foreign or damaged files are refused with a reason."""

import os
import pickle
import random
import resource
import signal
import stat
import struct
import time

import numpy as np
import pytest
import torch
from torch import nn

from moco_fast.train import checkpoint


def whole(number):
    # Below torch's grain size for threads, whose pool does not survive the fork of the test below.
    state = {f"module.{i}": torch.full((30_000,), float(number)) for i in range(8)}
    return {"epoch": number, "arch": "x", "state_dict": state, "optimizer": {}, "moco_fast": {"step": number}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # this process has threads; the children use none
def test_kill_9_while_writing_leaves_a_whole_file(tmp_path):
    """Forty processes killed at random moments of endless saving: the file is always whole, and moves on."""
    path = tmp_path / checkpoint.FILE_NAME
    checkpoint.write_atomic(path, whole(0))
    for trial in range(40):
        start = checkpoint.read(path)["epoch"]
        written, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for number in range(start + 1, 1_000_000):
                    checkpoint.write_atomic(path, whole(number))
                    os.write(told, b"!")
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(written, 1) == b"!"
        time.sleep(0.05 * random.Random(trial).random())
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        loaded = checkpoint.read(tmp_path)
        number = loaded["epoch"]
        os.close(written)
        assert loaded["moco_fast"]["step"] == number > start
        assert all((tensor == number).all() for tensor in loaded["state_dict"].values())


def test_failed_write_keeps_the_last_good_file(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.write_atomic(path, whole(1))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.write_atomic(path, whole(2) | {"x": lambda: None})
    assert checkpoint.read(path)["epoch"] == 1


def test_full_disk_is_an_error_that_leaves_no_debris(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.write_atomic(path, whole(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        with pytest.raises(OSError, match=r"c.pth could not be written .*the one before is kept"):
            checkpoint.write_atomic(path, whole(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    """What a kill cannot show, for the kernel keeps what was written: a power cut would lose it."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(stat.S_IFMT(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    checkpoint.write_atomic(tmp_path / "c.pth", whole(1))
    assert calls == [stat.S_IFREG, "rename", stat.S_IFDIR]


def test_random_state_round_trip(tmp_path):
    path = tmp_path / "c.pth"
    np.random.standard_normal()  # noqa: NPY002 - one of two that are drawn: the other is kept
    checkpoint.write_atomic(path, whole(1) | {"moco_fast": checkpoint.random_state()})

    def draw():
        normal = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), normal

    want = draw()
    draw()
    checkpoint.set_random_state(checkpoint.read(path)["moco_fast"])
    assert draw() == want


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_files_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pth"
    checkpoint.write_atomic(good, whole(1))
    data = good.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:length])
        with pytest.raises(
            checkpoint.CheckpointError, match=r"cut.pth is truncated or no checkpoint|weights_only"
        ):
            checkpoint.read("cut.pth")
    (tmp_path / "text.pth").write_text("hello\n")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"text.pth .*expected a file of torch.save with the keys"
    ):
        checkpoint.read("text.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"list.pth holds a list; expected"):
        checkpoint.read("list.pth")
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": {}, "optimizer": {}}, "official.pth")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"official.pth was not written by this trainer.*compat"
    ):
        checkpoint.read("official.pth")
    torch.save({"epoch": 3, "arch": "resnet50"}, "other.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"other.pth lacks state_dict.*it has epoch, arch"):
        checkpoint.read("other.pth")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(checkpoint.CheckpointError, match="is a safetensors file, of weights alone"):
        checkpoint.read("weights.safetensors")
    torch.save(whole(1) | {"x": Evil()}, "evil.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"evil.pth cannot be loaded with weights_only=True"):
        checkpoint.read("evil.pth")
    assert not (tmp_path / "evil-was-here").exists()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        checkpoint.read("absent")


def test_another_model_is_refused_before_anything_changes():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {"module.weight": torch.zeros(2, 4), "module.extra": torch.zeros(1)}
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_model(model, {"state_dict": state})
    for part in ("missing bias", "unexpected extra", "weight is (2, 4), expected (2, 3)"):
        assert part in str(error.value)
    assert torch.equal(model.weight, before)


def test_damaged_values_are_noticed(tmp_path):
    """The file loads all the same: only its checksums tell."""
    path = tmp_path / "checkpoint.pth"
    checkpoint.write_atomic(path, {"state_dict": {"weight": torch.full((1000,), 7.0)}})
    data = bytearray(path.read_bytes())
    at = data.index(torch.full((8,), 7.0).numpy().tobytes())
    data[at + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match=r"truncated or no.*the checksum of .*data/0 in"):
        checkpoint.read(path, keys=())


def test_as_many_values_in_another_shape_are_another_model():
    found = checkpoint.mismatches({"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(3, 2)})
    assert found == "weight is (2, 3), expected (3, 2)"
