"""The tables of drift."""

from __future__ import annotations

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import over_seeds, ratio_of_means
from experiments.laboratory.drift.analysis import Analysis
from experiments.laboratory.drift.follow import IN_UNITS, WHOLE


def tables(found: Analysis) -> list[Table]:
    s, last = found.settings, len(found.bounds) - 1
    by_horizon: list[list[Cell]] = []
    for i, n in enumerate(s.horizons):
        lr = found.tuned[i]
        loss = over_seeds(found.loss.values[:, i, lr], lambda v: float(np.exp(np.log(v).mean())))
        equal = [found.crossing(group, last, i) for group in (WHOLE, IN_UNITS)]
        by_horizon.append([str(n), f"{s.lr_multipliers[lr]:g}", loss, *equal, found.tracking(WHOLE, last, i)])
    groups: list[list[Cell]] = []
    for group in found.groups:
        for phase, (a, b) in enumerate(found.bounds):
            signal, noise = (found.levels[:, found.best, found.groups.index(group), phase, i] for i in range(2))
            simple = ratio_of_means(noise, signal)
            groups.append(
                [f"{group}, {a:,} to {b:,}", simple, found.crossing(group, phase), found.tracking(group, phase)]
            )
    return [
        Table(
            "Momentum of each horizon",
            "At its tuned learning rate (times the method's own): final training loss; and along its run, in the last "
            "phase, the horizon where drift equals noise, and that of the average closest to the gradient.",
            ["horizon", "lr", "final loss", "drift = noise", "in units of noise", "closest"],
            by_horizon,
            (found.best,),
        ),
        Table(
            "Drift and noise by layer and phase",
            f"Along the run of horizon {s.horizons[found.best]}: noise over signal, the horizon where drift equals "
            "noise, and that of the average closest to the gradient, all in examples.",
            ["parameters, phase", "tr Sigma / ||g||^2", "drift = noise", "closest"],
            groups,
            (),
        ),
    ]


TERMS = {
    "Drift": "||g(E+n) - g(E)||^2 of the gradient g over the training set, n examples apart.",
    "Noise": "tr Sigma, the trace of the covariance of per-example gradients over the training set; a batch of B has "
    "tr Sigma / B of it.",
    "Closest": "The horizon N, rho = 1 - 1/N for each example, at which the running average of the batches' gradients "
    "has the least squared distance to the gradient over the training set.",
    "In units of noise": "Every element of the gradient over the standard deviation of its per-example gradients, "
    "which is about how Adam scales them.",
}
