"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, *, sync: bool = False, aside: Path | None = None) -> Iterator[Path]:
    """A path beside ``path`` to write to, renamed to it when all is written; makes the folder too.

    Args:
        path: the file.
        sync: flush to the disk, the contents before the rename and the rename before this returns.
        aside: the path beside it, of files that one process at a time writes. Default: of this process's own.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        parent = next(parent for parent in path.parents if parent.exists())
        raise NotADirectoryError(f"{path} cannot be written: {parent} is not a folder") from error
    aside = aside or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        if sync:
            _flush(aside)
        os.replace(aside, path)
        if sync:
            _flush(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # someone else writes there
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as aside:
        aside.write_text(text)


def _flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
