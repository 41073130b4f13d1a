"""Import of the packages that only the extra ``train`` brings."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install '.[train]' in a checkout of moco_fast"


def extra(module: str) -> Any:
    """Return an optional module, or say how to get it.

    Args:
        module: dotted name, such as ``"PIL.Image"``.

    Raises:
        ImportError: the module is missing; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here ({error}): {INSTALL}") from error


def new_console(**options: Any) -> Any:
    """A rich Console that prints names of files and folders as they are, brackets included."""
    return extra("rich.console").Console(markup=False, emoji=False, **options)
