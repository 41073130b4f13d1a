"""From a checkpoint to a file of another layout, verified before it appears."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moco_fast import checks
from moco_fast.convert import targets
from moco_fast.convert.layouts import read_contents
from moco_fast.convert.verify import verify
from moco_fast.files import whole
from moco_fast.train.checkpoint import CheckpointError


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        out: the file.
        layout: of the file that was read.
        arch: of the backbone.
        encoder: "q" or "k"; None: both.
        tensors: how many.
        bytes: of the tensors.
        left_out: what the target does not hold.
        lacks: what ``main_moco.py --resume`` loads and an official file made of this one does not hold.
        verified: how the file was compared with its source, and what came out.
    """

    out: Path
    layout: str
    arch: str
    encoder: str | None
    tensors: int
    bytes: int
    left_out: tuple[str, ...]
    lacks: tuple[str, ...]
    verified: str


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    encoder: Literal["q", "k"] | None = None,
    arch: str | None = None,
    queue_size: int | None = None,
    trust: bool = False,
    force: bool = False,
) -> Report:
    """Write a checkpoint in the layout of another library.

    ``out`` appears when it is whole and verified, see :func:`moco_fast.convert.verify.verify`.

    Args:
        source: checkpoint of any layout in :mod:`moco_fast.convert.layouts`, or a run folder.
        out: file to write.
        to: one of ``targets.TARGETS``.
        encoder: the trained encoder, "q", or its moving average, "k"; default: "q" for a backbone, both for
            "official", "lightly" and "safetensors".
        arch: name of the backbone; default: what the file says.
        queue_size: K of a fresh queue in place of that of the file, for a target that holds one.
        trust: run the code that the file names, if it needs more than tensors.
        force: replace ``out`` if it exists; of a link, what it points to.

    Raises:
        FileNotFoundError: no ``source``.
        FileExistsError: ``out`` exists.
        CheckpointError: a file that cannot be read, a target that cannot hold it, or one that gives other
            features.
        TypeError, ValueError: an argument out of range, named.
        OSError: ``out`` cannot be written.
        ImportError: what the target needs is missing.
    """
    checks.one_of("to", to, targets.TARGETS)
    out = Path(out)
    if out.is_dir():
        raise FileExistsError(f"out must be a file, {out} is a folder")
    if (out.exists() or out.is_symlink()) and not force:
        raise FileExistsError(f"{out} exists: choose another name, or --force to replace it")
    if to in targets.WHOLE and encoder is not None:
        raise ValueError(f"encoder must be left out with {to}, which holds both, got {encoder!r}")
    if to in targets.BACKBONES:
        encoder = encoder or "q"
    if queue_size is not None and encoder is not None:
        raise ValueError(
            f"queue_size must be left out with {to} of one encoder, which holds no queue, got {queue_size}"
        )
    contents = read_contents(source, arch=arch, trust=trust)
    if queue_size is not None:
        contents = contents.with_fresh_queue(queue_size)
    held = targets.content(contents, to, encoder)
    real = Path(os.path.realpath(out))  # what a link points to is replaced, not the link
    with whole(real, sync=True) as aside:
        try:
            targets.write(aside, held, contents, to, encoder)
        except ImportError:
            raise
        except Exception as error:  # for a full disk torch and safetensors raise errors of their own
            raise OSError(f"{out} could not be written: {str(error).splitlines()[0]}") from error
        try:
            verified = verify(aside, contents, to, encoder)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(aside), str(out))) from error
    tensors = targets.tensors_in(held)
    return Report(
        out, contents.layout, contents.arch, encoder, len(tensors), sum(value.nbytes for value in tensors),
        tuple(targets.left_out(contents, to, encoder)), tuple(targets.lacking(contents, to)), verified,
    )  # fmt: skip
