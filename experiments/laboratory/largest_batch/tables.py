"""The tables of the largest batch, beside those of its contest."""

from __future__ import annotations

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import listed
from experiments.laboratory.largest_batch.analysis import START, Analysis
from experiments.laboratory.largest_batch.findings import BATCHES
from experiments.laboratory.largest_batch.predictors import PREDICTORS
from experiments.laboratory.schemas import LargestBatchConfig


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
                for label in found.plain
                for cell in (found.prediction(label, predictor), found.ratio_to_measured(label, predictor))
            ),
        ]
        for predictor in PREDICTORS
    ]
    along: list[list[Cell]] = []
    for label in found.plain:
        for i, count in enumerate(found.examples[label]):
            at = [np.exp(found.predicted[label, predictor][:, i].mean()) for predictor in PREDICTORS]
            sharpness = np.exp(np.log(found.sharpness[label][:, i]).mean())
            along.append([f"{label}, {count:,}", f"{sharpness:.3g}", *(f"{B:.3g}" for B in at)])
    B = found.settings.judged_batch_size
    saturated: list[list[Cell]] = [
        [label, found.best_loss(label), f"{found.best_size(label)}", found.tuned_once(label, B), found.score(label)]
        for label in (BATCHES, *found.saturating)
    ]
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
            "What saturating does",
            "The best training loss over learning rates and batch sizes, and where it is; the loss at "
            f"B = {B} with the learning rate tuned at B = {found.home}; and the standard deviation of ln(training "
            f"loss) over B in {listed(found.small())} with it, a mean over the curve after {START:.0%} of the examples "
            "and over seeds.",
            ["Method", "Best loss", "at B", f"At B = {B}", "Apart at small B"],
            saturated,
            (),
        ),
        Table(
            "What predicts it",
            "The batch size of each predictor, and its ratio to where invariance ends.",
            ["Predictor", *(column for label in found.plain for column in (label, "ratio"))],
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


def own_terms(settings: LargestBatchConfig) -> dict[str, str]:
    examined = "the training set"
    if settings.sample is not None:
        examined = f"{settings.sample:,} examples, evenly over the training set"
    return {
        "Ends at": f"The smallest batch size at which the final training loss is {settings.broken:g} times that at the "
        "smallest batch size, both at the learning rate tuned there over all seeds; interpolated in ln(loss) along "
        "ln(B).",
        "Curvature, noise and drift": f"Of the mean loss over {examined}.",
    } | TERMS_OF_PREDICTORS


TERMS_OF_PREDICTORS = {
    "Horizon of momentum": "N examples, with beta = 1 - 1/N for each: a batch of more is not averaged with others.",
    "Edge of stability": "The batch size B at which the largest eigenvalue of P^-1 H is (2 + 2 beta)/((1 - beta) "
    "step), with step = B lr/B0 and beta = beta0^(B/B0); H is the Hessian, P = sqrt(s) + eps of elements that "
    "have had a gradient.",
    "Noise scale": "tr Sigma / ||g||^2 of per-example gradients.",
    "Drift": "The batch size B at which ||g(E+B) - g(E)||^2 of the mean gradient is tr Sigma / B.",
    "Adam's units": "Squares of elements are divided by P.",
    "Predictions": "Of the look at the run where they are smallest, by geometric means over seeds; looks are "
    "log-spaced from a tenth of the run, or the end of the warm-up.",
}
