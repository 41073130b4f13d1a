"""The command ``moco-fast presets``."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Column, Table

from moco_fast.extras import new_console
from moco_fast.train.methods import METHODS
from moco_fast.train.presets import PRESETS


@dataclass
class Presets:
    """List the recipes, what they reach and who measured it, and the methods with their options."""

    def run(self) -> int:
        """Returns the exit status."""
        console = new_console()
        names = Column("--preset", no_wrap=True)  # as they have to be typed
        table = Table(names, "method", "what it is", "reached", "measured by", title="recipes")
        for name, preset in PRESETS.items():
            table.add_row(name, preset.config.method, preset.about, preset.reached, preset.measured_by)
        console.print(table)
        table = Table(Column("--method", no_wrap=True), "what it is", "options of its own", title="methods")
        for name, row in METHODS.items():
            options = " ".join(f"--{option.replace('_', '-')}" for option in row.options)
            table.add_row(name, row.about, options)
        console.print(table)
        return 0
