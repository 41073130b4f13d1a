"""Tables that commands print."""

from __future__ import annotations

from rich.table import Table

from moco_fast.evaluate.linear import LinearResult


def knn_table(
    accuracy: dict[str, float], k: int, weighted: bool = True, of_five: dict[str, float] | None = None
) -> Table:
    """Accuracies by name, and if given those of five guesses."""
    title = f"{k} nearest neighbour{'s' if k > 1 else ''}" + (", weighted" if weighted else "")
    table = Table("features", "kNN accuracy", "over random init", title=title)
    if of_five:
        table.add_column("one of 5 right")
    for name, value in accuracy.items():
        cells = [f"{value:.2%}", f"{100 * (value - accuracy['random init']):+.2f}"]
        table.add_row(name, *cells, *([f"{of_five[name]:.2%}"] if of_five else ()))
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
