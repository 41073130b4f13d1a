"""Looking at arguments before they are parsed."""

from __future__ import annotations

from collections.abc import Sequence


def value_of(option: str, argv: Sequence[str]) -> str | None:
    """Value of an option given as ``--option value`` or ``--option=value``."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == option:
            return following
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None
