"""The tables of private."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.laboratory.private.analysis import Analysis
from experiments.laboratory.private.methods import ADAM, METHODS


def tables(found: Analysis) -> list[Table]:
    return [_accuracies(found), _runs(found)]


def _accuracies(found: Analysis) -> Table:
    epsilons = found.settings.epsilons
    rows: list[list[Cell]] = [
        [method, *(found.accuracy(method, epsilon) for epsilon in (*epsilons, None))] for method in METHODS
    ]
    best = max(range(len(rows)), key=lambda i: sum(found.accuracy(METHODS[i], e).value for e in epsilons))
    return Table(
        title="Held-out accuracy by epsilon",
        explanation=f"In percent, at delta = {found.settings.delta:g}, means over seeds, each method at its tuned "
        "learning rate.",
        columns=["Method", *(f"epsilon = {epsilon:g}" for epsilon in epsilons), "No privacy"],
        rows=rows,
        emphasised=(best,),
    )


def _runs(found: Analysis) -> Table:
    rows: list[list[Cell]] = []
    for epsilon in found.settings.epsilons:
        for method in METHODS:
            runs = found.runs[method, epsilon]
            lr = found.settings.lrs[method] * 2 ** runs.octaves[runs.tuned(found.everyone)]
            rows.append(
                [
                    f"{epsilon:g}, {method}",
                    f"{runs.sigma:.2f}",
                    f"{lr:.3g}",
                    found.loss(method, epsilon),
                    found.lost(method, epsilon),
                    found.clipped(method, epsilon),
                    # DP-SGD has no second moment, and the corrected one takes the noise out of its own.
                    found.noise_share(method, epsilon) if method == ADAM else "",
                ]
            )
    return Table(
        title="Tuned runs",
        explanation="Noise multiplier, tuned learning rate, training loss (nats, geometric mean), accuracy lost to "
        "privacy (points), examples that were clipped and noise in the second moment (%).",
        columns=["Epsilon, method", "Sigma", "lr", "Loss", "Points lost", "Clipped", "Noise"],
        rows=rows,
        emphasised=(),
    )


TERMS = {
    "Epsilon": "A run is (epsilon, delta)-differentially private with respect to adding or removing one example: of "
    "its steps, not of tuning, which sees the data as well. By Opacus' accountant of Renyi divergences.",
    "Sigma": "The noise multiplier: noise of standard deviation sigma C beside a sum of gradients whose norms are at "
    "most C.",
    "Tuned": "The learning rate with the lowest geometric mean of the training loss over seeds, for each method and "
    "epsilon: the same octaves around each method's own, and further ones while the best lies at an end.",
    "DP-AdamBC": "DP-Adam whose second moment is less by the variance of the noise in it (Tang et al. 2023).",
    "No privacy": "The same steps on the same Poisson samples with neither clipping nor noise. DP-AdamBC is DP-Adam "
    "there.",
}
