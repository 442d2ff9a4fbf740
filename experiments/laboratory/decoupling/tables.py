"""The tables of decoupling."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.laboratory.decoupling.analysis import AXES, Analysis

SIDES = {"torch": "torch", "examples": "in examples"}


def tables(analysis: Analysis) -> list[Table]:
    rows: list[list[Cell]] = []
    best: list[list[Cell]] = []
    for axis, pair in analysis.maps.items():
        for units, found in pair.items():
            name = f"{AXES[axis].label}, {SIDES[units]}"
            rows.append([name, found.drift, found.slope])
            best += [[name, f"{value:g}", lr] for value, lr in zip(found.values, found.best_lr, strict=True)]
    return [
        Table(
            title="Drift of the best learning rate",
            explanation="Drift: octaves between the largest and the smallest best learning rate. Slope: octaves an "
            "octave of the other hyperparameter, 0 where the learning rate is decoupled from it.",
            columns=["Hyperparameter, units", "Drift (octaves)", "Slope"],
            rows=rows,
            emphasised=tuple(range(1, len(rows), 2)),
        ),
        Table(
            title="Best learning rates",
            explanation="Of a step in torch's units, of an example in the others; horizons are in examples in both.",
            columns=["Hyperparameter, units", "Value", "Best learning rate"],
            rows=best,
            emphasised=(),
        ),
    ]


TERMS = {
    "In torch's units": "Adam and SGD as in torch.optim: a learning rate a step, horizons in steps (here given in "
    "examples), Adam's squares those of batch means. SGD's momentum is v <- beta v + g.",
    "In units of examples": "A learning rate lr0 an example, a step of B lr0; horizons in examples; momentum a mean of "
    "gradients; Adam's squares those of examples (R = 1); eps as in B lr0 m~ / (1 + sqrt(s)/eps).",
}
