"""Whether a predictor says where invariance ends, whether the step or the statistic ends it, and what pushes it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from experiments.estimate import Estimate, Finding, Verdict, notes
from experiments.laboratory.largest_batch.analysis import BROKEN, Analysis
from experiments.laboratory.largest_batch.predictors import (
    DRIFT,
    DRIFT_IN_UNITS,
    EDGE,
    HORIZON,
    NOISE,
    NOISE_IN_UNITS,
    PREDICTORS,
)
from experiments.laboratory.verdicts import both, within

EXAMPLES, BATCHES, SHORT = "R = 1", "R = 16", "R = 16, short momentum"
PLAIN = (EXAMPLES, BATCHES, SHORT)
SATURATING = {
    "saturating, model": "the noise scale of the model",
    "saturating, 8 x model": "8 times the noise scale of the model",
    "saturating, layer": "the noise scale of each layer",
    "saturating, coordinate": "the noise scale of each coordinate",
}
FACTOR = 2.0  # within which a prediction is right
PRICE = 1.05  # of a loss, above which a method is worse

SAID = {
    HORIZON: "the horizon of the momentum, beyond which nothing is averaged",
    EDGE: "the edge of stability of preconditioned momentum descent",
    NOISE: "the gradient noise scale",
    NOISE_IN_UNITS: "the noise scale in Adam's units",
    DRIFT: "drift of the gradient over a batch as large as the batch's noise",
    DRIFT_IN_UNITS: "that drift and noise in Adam's units",
}


def findings(found: Analysis) -> list[Finding]:
    return [
        *(_predicts(found, predictor) for predictor in PREDICTORS),
        _step(found),
        _statistic(found),
        *(_pushes(found, label) for label in SATURATING),
        *(_price(found, label) for label in SATURATING),
        *notes([_nearest(found), _over_time(found), _kept(found)]),
    ]


def measured(found: Analysis, label: str, below: int = 0) -> str:
    largest = found.sizes[-1]
    return f"beyond {largest}" if found.beyond(label, below) else f"{found.breakdown(label, below)}"


def _predicts(found: Analysis, predictor: str) -> Finding:
    ratios = {label: found.ratio_to_measured(label, predictor) for label in PLAIN}
    told = "; ".join(
        f"{label}: {found.prediction(label, predictor)} against {measured(found, label)}, a ratio of {ratio}"
        for label, ratio in ratios.items()
    )
    return Finding(
        f"Invariance ends at {SAID[predictor]}, within a factor of {FACTOR:g}",
        _all(judged(found, label, ratio) for label, ratio in ratios.items()),
        f"Predicted against measured batch sizes are {told}.",
    )


def judged(found: Analysis, label: str, ratio: Estimate) -> Verdict:
    """Where invariance does not end within the batch sizes, the ratio is at most this one."""
    if found.beyond(label):
        return "does not hold" if ratio.high < 1 / FACTOR else "cannot be judged"
    return within(ratio, 1 / FACTOR, FACTOR)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    found: Verdict = "holds"
    for verdict in verdicts:
        found = both(found, verdict)
    return found


def _step(found: Analysis) -> Finding:
    ratios = {label: found.earlier(label, label, below=1) for label in PLAIN}
    told = "; ".join(
        f"{label}: {measured(found, label)} against {measured(found, label, 1)}, a ratio of {ratio}"
        for label, ratio in ratios.items()
    )
    verdicts: list[Verdict] = [
        "cannot be judged" if found.beyond(label) else ratio.verdict(1) for label, ratio in ratios.items()
    ]
    return Finding(
        "It is the step that ends invariance: with half the tuned learning rate it lasts to larger batches",
        _all(verdicts),
        f"With the tuned learning rate it ends at, against half of that: {told}.",
    )


def _statistic(found: Analysis) -> Finding:
    ratio = found.earlier(EXAMPLES, BATCHES)
    unknown = found.beyond(EXAMPLES) or found.beyond(BATCHES)
    return Finding(
        f"It is not the statistic: with R = 1 invariance ends where it does with R = 16, within a factor of {FACTOR:g}",
        "cannot be judged" if unknown else within(ratio, 1 / FACTOR, FACTOR),
        f"It ends at {measured(found, EXAMPLES)} with R = 1 and at {measured(found, BATCHES)} with R = 16, a ratio of "
        f"{ratio}.",
    )


def _pushes(found: Analysis, label: str) -> Finding:
    ratio = found.earlier(BATCHES, label)
    return Finding(
        f"A step that saturates at {SATURATING[label]} is invariant to larger batches",
        "cannot be judged" if found.beyond(BATCHES) else ratio.verdict(1),
        f"Invariance ends at {measured(found, label)} with it and at {measured(found, BATCHES)} without, which is "
        f"{ratio} of that. At B = {found.sizes[-1]} the loss is {found.broken(label, -1)} times that at "
        f"B = {found.home}, without {found.broken(BATCHES, -1)} times.",
    )


def _price(found: Analysis, label: str) -> Finding:
    ratio = found.ratio(label, BATCHES, found.home)
    return Finding(
        f"Saturating at {SATURATING[label]} costs nothing at B = {found.home}: the loss is at most {PRICE:g} times "
        "that of the whole step",
        ratio.verdict(PRICE),
        f"Training loss {found.loss(label, found.home)} against {found.loss(BATCHES, found.home)}, a ratio of {ratio}, "
        "each at its tuned learning rate.",
    )


def _nearest(found: Analysis) -> str:
    everyone = found.everyone

    def distances(averaged: bool) -> str:
        def distance(predictor: str) -> float:
            off = []
            for label in PLAIN:
                along = found.predicted[label, predictor].mean(axis=0)
                predicted = along.mean() if averaged else along.min()
                off.append(abs(predicted - found.log_breakdown(label, everyone)))
            return float(np.exp(np.mean(off)))

        ranked = sorted(PREDICTORS, key=distance)
        return ", ".join(f"{predictor} by a factor of {distance(predictor):.2g}" for predictor in ranked)

    return (
        f"Distances of predictions from what is measured, the smallest batch size with {BROKEN:g} times the loss, or "
        f"the largest there is: {distances(averaged=False)}; geometric means over {len(PLAIN)} methods. With the mean "
        f"over the looks at a run, in place of the look where a prediction is smallest: {distances(averaged=True)}."
    )


def _over_time(found: Analysis) -> str:
    def told(label: str) -> str:
        tuned = found.tuned[label]
        shares = [
            f"{sharpness / tuned.stability(found.home):.2g}"
            for sharpness in np.exp(np.log(found.sharpness[label]).mean(axis=0))
        ]
        return f"{label} {', '.join(shares)}"

    return (
        "The sharpness of P^-1 H along the tuned runs, over what their own steps are stable at, is: "
        f"{'; '.join(told(label) for label in PLAIN)}; below 1 the run at the tuning batch size is inside of the edge."
    )


def _kept(found: Analysis) -> str:
    largest = found.sizes[-1]
    told = ", ".join(f"{label} {found.kept(label, largest, found.home)}" for label in found.labels)
    return (
        f"At B = {largest}, the learning rate tuned at B = {found.home} instead of one tuned there makes the training "
        f"loss so many times as high: {told}."
    )
