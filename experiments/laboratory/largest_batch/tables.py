"""The tables of the largest batch, beside those of its contest."""

from __future__ import annotations

import numpy as np

from experiments.documents import Cell, Table
from experiments.laboratory.largest_batch.analysis import BROKEN, Analysis
from experiments.laboratory.largest_batch.predictors import PREDICTORS


def own_tables(found: Analysis) -> list[Table]:
    away = [B for B in found.sizes if found.home != B]
    ends: list[list[Cell]] = []
    for label in found.labels:
        losses = [found.broken(label, i) for i in range(1, len(found.sizes))]
        ends.append([label, *losses, _end(found, label), _end(found, label, 1)])
    predicted: list[list[Cell]] = [
        [
            predictor,
            *(
                cell
                for label in found.looked_at()
                for cell in (found.prediction(label, predictor), found.ratio_to_measured(label, predictor))
            ),
        ]
        for predictor in PREDICTORS
    ]
    along: list[list[Cell]] = []
    for label in found.looked_at():
        for i, count in enumerate(found.examples[label]):
            at = [np.exp(found.predicted[label, predictor][:, i].mean()) for predictor in PREDICTORS]
            sharpness = np.exp(np.log(found.sharpness[label][:, i]).mean())
            along.append([f"{label}, {count:,}", f"{sharpness:.3g}", *(f"{B:.3g}" for B in at)])
    return [
        Table(
            "Where invariance ends",
            f"With the learning rate tuned at B = {found.home}: training loss at the other batch sizes over that, and "
            "the batch size at which it ends; also with half the learning rate.",
            ["Method", *(f"B = {B}" for B in away), "Ends at", "Half the lr"],
            ends,
            (),
        ),
        Table(
            "What predicts it",
            "The batch size of each predictor, and its ratio to where invariance ends.",
            ["Predictor", *(column for label in found.looked_at() for column in (label, "ratio"))],
            predicted,
            (),
        ),
        Table(
            "Predictions along the runs",
            f"At B = {found.home} with the tuned learning rate, after so many examples: the largest eigenvalue of "
            "P^-1 H, and the batch size of each predictor, geometric means over seeds.",
            ["Run, examples", "sharpness", *PREDICTORS],
            along,
            (),
        ),
    ]


def _end(found: Analysis, label: str, below: int = 0) -> Cell:
    return f"> {found.sizes[-1]}" if found.beyond(label, below) else found.breakdown(label, below)


OWN_TERMS = {
    "Ends at": f"The smallest batch size at which the final training loss is {BROKEN:g} times that at the smallest "
    "batch size, both at the learning rate tuned there over all seeds; interpolated in ln(loss) along ln(B).",
    "Horizon of momentum": "N examples, with beta = 1 - 1/N for each: a batch of more is not averaged with others.",
    "Edge of stability": "The batch size B at which the largest eigenvalue of P^-1 H is (2 + 2 beta)/((1 - beta) "
    "step), with step = B lr/B0 and beta = beta0^(B/B0); H is the Hessian of the training loss, P = sqrt(s) + eps.",
    "Noise scale": "tr Sigma / ||g||^2 of per-example gradients over the training set.",
    "Drift": "The batch size B at which ||g(E+B) - g(E)||^2 of the gradient over the training set is tr Sigma / B.",
    "Adam's units": "Squares of elements are divided by P.",
    "Predictions": "Of the look at the run where they are smallest, by geometric means over seeds; looks are "
    "log-spaced from a tenth of the run.",
}
