"""Looking at arguments before they are parsed."""

from __future__ import annotations

from collections.abc import Sequence


def value_of(option: str, argv: Sequence[str]) -> str | None:
    """Value of an option given as ``--option value`` or ``--option=value``; the last one counts."""
    value = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(option + "="):
            value = argument.partition("=")[2]
    return value
