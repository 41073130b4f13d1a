"""Output that does not end a run when nobody takes it any more.

Tests: tests/test_lasting.py.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def lasting_output() -> Iterator[None]:
    """In the block writes to standard output and standard error never fail.

    A pager that was closed, a full disk under a log: what is written from then on goes nowhere. Characters
    that the encoding lacks, as of a file's name, are written as escapes.
    """
    before = sys.stdout, sys.stderr
    now = sys.stdout, sys.stderr = _lasting(before[0]), _lasting(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in now:
            if isinstance(stream, _Lasting):
                stream.detach()  # or it would close the descriptor


def _lasting(stream: TextIO) -> TextIO:
    if type(stream) is not io.TextIOWrapper:  # closed, or what a test or a notebook put in its place
        return stream
    stream.flush()
    return _Lasting(
        stream.buffer, encoding=stream.encoding, errors="backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


class _Lasting(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Point the descriptor at nothing: what is still in buffers has to go somewhere too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
