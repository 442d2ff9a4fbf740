"""The tables of sgd_momentum."""

from __future__ import annotations

from itertools import product

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import over_seeds
from experiments.laboratory.sgd_momentum.analysis import LABELS, POSITIONS, SCALINGS, UNITS, Analysis
from experiments.laboratory.sgd_momentum.noisy_quadratic import METHODS


def tables(analysis: Analysis) -> list[Table]:
    return [_methods(analysis), _batch_sizes(analysis), _digits(analysis)]


def _methods(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for method in METHODS:
        rows.append(
            [
                LABELS[method],
                over_seeds(analysis.time_to(0.5, method) * settings.lr),
                over_seeds(analysis.time_to(0.1, method) * settings.lr),
                over_seeds(analysis.variance[method] * 2 / settings.lr),
                f"{analysis.effect[method, False][1][0]:.3g}",
                f"{analysis.effect[method, False][1][-1]:.3g}",
            ]
        )
    return Table(
        f"On the quadratic, at B = {settings.tuning_batch_size} and equal total effect",
        f"Time until the mean falls to a half and to a tenth, in units of 1/lr0 = {1 / settings.lr:,.0f} examples; "
        "variance once settled, in units of lr0/2; how far the first batch moves the parameter in total, and one that "
        f"comes after {POSITIONS} horizons, in units of lr0 g. Brackets: 95% bootstrap intervals over "
        f"{len(settings.seeds)} seeds of {settings.replicas} runs each.",
        ["method", "time to 1/2", "time to 1/10", "settled variance", "effect first", "effect later"],
        rows,
        tuple(i for i, method in enumerate(METHODS) if method in ("heavy_ball", "debiased_ewma")),
    )


def _batch_sizes(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for i, size in enumerate(settings.batch_sizes):
        numbers = [
            over_seeds(values[:, i])
            for unit in UNITS
            for values in (
                analysis.time_by_size[unit] * settings.lr,
                analysis.variance_by_size[unit] * 2 / settings.lr,
            )
        ]
        rows.append([str(size), *numbers])
    return Table(
        "On the quadratic, over batch sizes",
        "torch: lr and momentum as they are; ours: lr0 and the horizon as they are. Time to a tenth and settled "
        "variance, in the units of the table above.",
        ["B", "time, torch", "variance, torch", "time, ours", "variance, ours"],
        rows,
        (),
    )


def _digits(analysis: Analysis) -> Table:
    settings = analysis.settings
    rows: list[list[Cell]] = []
    for scaling, fraction in product(SCALINGS, settings.lr_fractions):
        final = np.exp(analysis.digits[scaling, fraction][:, :, -1])
        rows.append(
            [
                LABELS[scaling],
                f"{analysis.lr * fraction:.3g}",
                over_seeds(analysis.score(scaling, fraction)),
                *(over_seeds(final[:, i]) for i in range(len(settings.batch_sizes))),
            ]
        )
    return Table(
        "On the digits, over batch sizes",
        f"Training loss at the end, with the lr tuned for the heavy ball at B = {settings.tuning_batch_size}, "
        f"{analysis.lr:.3g}, and parts of it; there all but the last are one algorithm. Score: the standard deviation "
        "over B of ln(training loss), mean over the counts of examples after 5% of the run.",
        ["method", "lr", "score", *(f"loss B={size}" for size in settings.batch_sizes)],
        rows,
        tuple(i for i, (scaling, _) in enumerate(product(SCALINGS, settings.lr_fractions)) if "ours" in scaling),
    )


TERMS = {
    "lr0": "The total effect: one example with gradient g moves the parameters by lr0 g sooner or later. In torch's "
    "units lr = B lr0 (1 - momentum).",
    "Horizon N": "Of the running average, in examples: momentum = (1 - 1/N)^B.",
    "Quadratic": "(theta - x)^2 / 2 an example, with x normal of variance 1; from theta = 1.",
    "Dampened": "torch's dampening = momentum: a running average, whose first gradient counts as a whole horizon.",
    "Near-zero gradients": "Examples that are masked, or learnt: in a batch they count for B, and have no gradient.",
}
