"""Tables that commands print."""

from __future__ import annotations

from rich.table import Table

from moco_fast.evaluate.linear import LinearResult


def accuracy_table(accuracy: dict[str, float], k: int) -> Table:
    table = Table("features", "kNN accuracy", "over random init", title=f"{k} nearest neighbours, weighted")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.2%}", f"{100 * (value - accuracy['random init']):+.2f}")
    return table


def knn_table(accuracy: dict[str, tuple[float, float]], k: int, weighted: bool) -> Table:
    title = f"{k} nearest neighbour{'s' if k > 1 else ''}" + (", weighted" if weighted else "")
    table = Table("features", "kNN accuracy", "over random init", "one of 5 right", title=title)
    for name, (first, five) in accuracy.items():
        over = 100 * (first - accuracy["random init"][0])
        table.add_row(name, f"{first:.2%}", f"{over:+.2f}", f"{five:.2%}")
    return table


def linear_table(results: dict[str, LinearResult]) -> Table:
    table = Table("features", "accuracy", "one of 5 right", "lr", title="Linear classification")
    for name, result in results.items():
        best = result.best
        table.add_row(name, f"{best.acc1:.2%}", f"{best.acc5:.2%}", f"{best.lr:g}")
    return table


def sweep_table(result: LinearResult) -> Table:
    table = Table(
        "lr", "held-out accuracy", "test accuracy", "one of 5 right", title="Learning rates, trained features"
    )
    for i, head in enumerate(result.heads):
        cells = ["diverged", "", ""]
        if not head.diverged and head.held_out is not None:
            cells = [f"{head.held_out:.2%}", f"{head.acc1:.2%}", f"{head.acc5:.2%}"]
        table.add_row(f"{head.lr:g}{' *' if i == result.chosen else ''}", *cells)
    table.caption = "* chosen on held-out training images"
    return table
