"""The tables of the growing batch."""

from __future__ import annotations

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, geometric_mean
from experiments.laboratory.adaptive_batch.analysis import GROWING, Analysis


def tables(found: Analysis) -> list[Table]:
    labels = list(found.tuned)
    best = min(range(len(labels)), key=lambda i: float(found.tuned[labels[i]].loss().value))
    equal: list[list[Cell]] = [
        [
            label,
            f"{found.tuned[label].lr:.3g}",
            found.tuned[label].loss(),
            found.tuned[label].loss(held_out=True),
            f"{np.median(found.races[label].steps[:, -1]):,.0f}",
            f"{np.median(found.races[label].seconds[:, -1]):.2f}",
        ]
        for label in labels
    ]
    limited: list[list[Cell]] = [
        [
            f"{price}: {growing} against {rival}",
            f"{tuned.examples:,}",
            f"{tuned.lr:.3g}",
            tuned.loss(),
            found.ratio_at_equal(price, growing, rival),
            found.ratio_at_equal(price, growing, rival, held_out=True),
        ]
        for (price, growing, rival), tuned in found.limited.items()
    ]
    grown: list[list[Cell]] = [
        [f"{count:,}", *(_mean(values[:, i]) for label in GROWING for values in _followed(found, label))]
        for i, count in enumerate(found.counts)
    ]
    return [
        Table(
            "At equal examples",
            f"After {found.counts[-1]:,} examples, each at its own tuned learning rate: final losses (nats), steps, "
            "and the seconds of training where all contenders take turns.",
            ["Contender", "Tuned lr", "Training loss", "Held-out loss", "Steps", "Seconds"],
            equal,
            (best,),
        ),
        Table(
            "At equal seconds and steps",
            "A decay, tuned over as many examples as take it the seconds, or steps, that the growing batch takes for "
            "its own: its training loss (nats), and the losses of the growing batch over its losses, whose intervals "
            "have the uncertainty of that time.",
            ["Pair", "Examples", "Tuned lr", "Its loss", "Training ratio", "Held-out ratio"],
            limited,
            (),
        ),
        Table(
            "How batches grew",
            "Batch size, and noise scale over the training set, after so many examples.",
            ["Examples", *(column for label in GROWING for column in (f"{label}: B", "noise scale"))],
            grown,
            (),
        ),
    ]


def _followed(found: Analysis, label: str) -> tuple[Array, Array]:
    return found.races[label].size, found.races[label].noise


def _mean(values: Array) -> Estimate:
    """Over the seeds of which it is known; an interval only where it is of all."""
    known = values[np.isfinite(values)]
    if len(known) == len(values):
        return geometric_mean(known)
    mean = float(np.exp(np.log(known).mean())) if len(known) else float("nan")
    return Estimate(mean, float("nan"), float("nan"))


TERMS = {
    "Growing batch": "B doubles once the interval of the measured noise scale tr Sigma / |G|^2 lies above 2 B "
    "(AdaptiveBatchSize); the learning rate of an example, lr0, stays.",
    "Constant step": "lr0 falls as 1/B while B grows, so that the step B lr0 stays, as Smith et al. have it.",
    "Tuned": "The learning rate with the lowest geometric mean of the final training loss over seeds, in factors of 2 "
    "of the method's default; for every contender the same ones to begin with, and further ones until the best has a "
    "neighbour on either side.",
    "Seconds": "Of training steps alone, what measures the noise scale included: processor time of the one thread of "
    "a run, in which what else the machine does hardly shows; medians over runs in which all contenders take turns.",
}
