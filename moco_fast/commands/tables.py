"""Tables that commands print."""

from __future__ import annotations

from rich.table import Table


def accuracy_table(accuracy: dict[str, float], k: int) -> Table:
    table = Table("features", "kNN accuracy", "over random init", title=f"{k} nearest neighbours, weighted")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.2%}", f"{100 * (value - accuracy['random init']):+.2f}")
    return table


def knn_table(accuracy: dict[str, tuple[float, float]], k: int, weighted: bool) -> Table:
    title = f"{k} nearest neighbours" + (", weighted" if weighted else "")
    table = Table("features", "kNN accuracy", "over random init", "one of 5 right", title=title)
    for name, (first, five) in accuracy.items():
        over = 100 * (first - accuracy["random init"][0])
        table.add_row(name, f"{first:.2%}", f"{over:+.2f}", f"{five:.2%}")
    return table
