"""The tables of a contest."""

from __future__ import annotations

from experiments.contest.analysis import Contest
from experiments.documents import Cell, Table


def tables(found: Contest) -> list[Table]:
    return [_at(found, B) for B in found.settings.batch_sizes]


def _at(found: Contest, B: int) -> Table:
    rows: list[list[Cell]] = [
        [
            label,
            found.loss(label, B),
            found.held_out(label, B),
            f"{found.runs[label, B].lr[found.best(label, B)]:.3g}",
            found.doubled(label, B),
            f"{found.seconds(label, B):.1f}",
        ]
        for label in found.labels
    ]
    best = min(range(len(rows)), key=lambda i: found.log_loss(found.labels[i], B, found.everyone))
    return Table(
        title=f"B = {B}",
        explanation="Final losses (nats), geometric means over seeds, each at its own tuned learning rate; what twice "
        "that learning rate does to the training loss, as a factor; and what a run takes, its evaluations included.",
        columns=["Method", "Training loss", "Held-out loss", "Tuned lr", "At twice the lr", "Seconds"],
        rows=rows,
        emphasised=(best,),
    )


TERMS = {
    "Tuned": "The learning rate with the lowest geometric mean of the final training loss over seeds, in factors of 2 "
    "of the method's default; for every method and batch size the same ones to begin with, and further ones until the "
    "best has a neighbour on either side.",
}
