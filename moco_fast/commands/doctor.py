"""The command ``moco-fast doctor``."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from moco_fast import doctor
from moco_fast.extras import new_console


@dataclass
class Doctor:
    """Show what is installed, what was built and why, and which backend serves which op."""

    def run(self) -> int:
        """Returns the exit status."""
        table = Table("what", "state", title="moco-fast doctor")
        for what, state in doctor.report():
            table.add_row(what, state)
        new_console().print(table)
        return 0
