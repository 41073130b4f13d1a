"""Peers through ``torch.compile``, which a run that leaves them out must not wait for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import torch


def compile_later(function: Callable, **options) -> Callable:
    """``torch.compile(function, **options)``, made when first called."""

    @cache
    def made() -> Callable:
        return torch.compile(function, **options)

    return lambda *arguments: made()(*arguments)


def forget() -> None:
    """Drop what was compiled: one function is compiled for a few shapes only, and every case is another."""
    if "torch._dynamo" in sys.modules:  # seconds to import, and nothing to forget then
        torch._dynamo.reset()
