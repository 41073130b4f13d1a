"""Files that appear whole or not at all, and leave nothing where they do not appear."""

import os
import stat

import pytest

from moco_fast.files import whole


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="half way"), whole(tmp_path / "new" / "deep" / "file") as aside:
        aside.write_text("half")
        raise ValueError("half way")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(ValueError, match="half way"), whole(path) as aside:
        aside.write_text("half")
        raise ValueError("half way")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_in_which_others_write_stays(tmp_path):
    path = tmp_path / "folder" / "file"
    with pytest.raises(ValueError, match="half way"), whole(path):
        path.with_name("another").touch()
        raise ValueError("half way")
    assert path.with_name("another").exists()


@pytest.mark.parametrize("sync", [False, True])
def test_what_reaches_the_disk(tmp_path, monkeypatch, sync):
    """The contents before the name, which a power cut would otherwise lose."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(stat.S_IFMT(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with whole(tmp_path / "file", sync=sync) as aside:
        aside.write_text("all")
    assert calls == ([stat.S_IFREG, "rename", stat.S_IFDIR] if sync else ["rename"])
