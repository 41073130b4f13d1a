"""Tables that commands print."""

from __future__ import annotations

from rich.table import Table


def accuracy_table(accuracy: dict[str, float], k: int) -> Table:
    table = Table("features", "kNN accuracy", "over random init", title=f"{k} nearest neighbours, weighted")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.2%}", f"{100 * (value - accuracy['random init']):+.2f}")
    return table
