"""Whether a predictor says where invariance ends, whether the step or the statistic ends it, and what pushes it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from experiments.estimate import Estimate, Finding, Verdict, listed, notes
from experiments.laboratory.largest_batch.analysis import Analysis
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

EXAMPLES, BATCHES = "R = 1", "R = 16"
FACTOR = 2.0  # within which a prediction is right
PRICE = 1.05  # of a loss, above which a method is worse
CLOSE = 0.25  # to a slope
SLOPES = {
    -1.0: "It is B lr that ends invariance",
    # (2 + 2 beta)/((1 - beta) step) of the edge is about 4 N B0/(B^2 lr) where B is far below the horizon N.
    -0.5: "It is B^2 lr that ends invariance, as at the edge of stability of momentum with the same curvature",
}

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
        *_step(found),
        _statistic(found),
        *(claim(found, label) for claim in (_pushes, _large, _best, _price, _small) for label in found.saturating),
        *notes([_nearest(found), _over_time(found), _kept(found)]),
    ]


def measured(found: Analysis, label: str) -> str:
    largest = found.sizes[-1]
    return f"beyond {largest}" if found.beyond(label) else f"{found.breakdown(label)}"


def _predicts(found: Analysis, predictor: str) -> Finding:
    ratios = {label: found.ratio_to_measured(label, predictor) for label in found.plain}
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


def _step(found: Analysis) -> list[Finding]:
    """From all learning rates up to the tuned one."""
    seen = {label: found.ends_within(label) for label in found.plain}
    sloping = [label for label, belows in seen.items() if len(belows) > 1]

    def ends(label: str) -> str:
        told = [f"{found.breakdown(label, below).text()} at {found.lr(label, below):.2g}" for below in seen[label]]
        return f"{label}: {found.slope([label])}, with B and lr of {', '.join(told) or 'none'}"

    slope = found.slope(sloping) if sloping else Estimate(np.nan, np.nan, np.nan)
    return [
        Finding(
            "It is the step that ends invariance: the batch size B where it ends falls with the learning rate",
            slope.verdict(0),
            f"Slope of ln(B) along ln(lr), a mean of {len(sloping)} methods: {slope}. The limit of a statistic, or of "
            f"a horizon, knows no learning rate: a slope of 0. {'; '.join(map(ends, seen))}.",
        ),
        *(
            Finding(
                f"{claim}: ln(B) falls along ln(lr) by a slope of {expected:g}, within {CLOSE:g}",
                within(slope, expected - CLOSE, expected + CLOSE),
                f"It is {slope}.",
            )
            for expected, claim in SLOPES.items()
        ),
    ]


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
        f"A step that saturates at {found.saturating[label]} is invariant to larger batches",
        "cannot be judged" if found.beyond(BATCHES) else ratio.verdict(1),
        f"Invariance ends at {measured(found, label)} with it and at {measured(found, BATCHES)} without, which is "
        f"{ratio} of that. At B = {found.sizes[-1]} the loss is {found.broken(label, -1)} times that at "
        f"B = {found.home}, without {found.broken(BATCHES, -1)} times.",
    )


def _large(found: Analysis, label: str) -> Finding:
    B = found.settings.judged_batch_size
    ratio = found.ratio_tuned_once(label, BATCHES, B)
    return Finding(
        f"Saturating at {found.saturating[label]} lowers the loss at B = {B}, with the learning rate tuned at "
        f"B = {found.home}",
        ratio.verdict(1),
        f"Training loss {found.tuned_once(label, B)} against {found.tuned_once(BATCHES, B)}, a ratio of {ratio}.",
    )


def _best(found: Analysis, label: str) -> Finding:
    ratio = found.best_ratio(label, BATCHES)
    return Finding(
        f"Saturating at {found.saturating[label]} lowers the best loss over learning rates and batch sizes",
        ratio.verdict(1),
        f"Training loss {found.best_loss(label)} at B = {found.best_size(label)} against {found.best_loss(BATCHES)} at "
        f"B = {found.best_size(BATCHES)}, a ratio of {ratio}.",
    )


def _price(found: Analysis, label: str) -> Finding:
    ratio = found.ratio(label, BATCHES, found.home)
    return Finding(
        f"Saturating at {found.saturating[label]} costs nothing at B = {found.home}: the loss is at most {PRICE:g} "
        "times that of the whole step",
        ratio.verdict(PRICE),
        f"{found.compared(label, BATCHES, found.home)}, each at its tuned learning rate.",
    )


def _small(found: Analysis, label: str) -> Finding:
    ratio = found.score_ratio(BATCHES, label)
    return Finding(
        f"Saturating at {found.saturating[label]} is paid for in invariance at small batches: curves of B in "
        f"{listed(found.small())} are further apart",
        ratio.verdict(1),
        f"The standard deviation of ln(training loss) over these batch sizes is {found.score(label)} with it and "
        f"{found.score(BATCHES)} without, which is {ratio} of that, where losses at B = {found.home} are "
        f"{found.loss(label, found.home)} and {found.loss(BATCHES, found.home)}.",
    )


def _nearest(found: Analysis) -> str:
    everyone = found.everyone

    def distances(averaged: bool) -> str:
        def distance(predictor: str) -> float:
            off = []
            for label in found.plain:
                along = found.predicted[label, predictor].mean(axis=0)
                predicted = along.mean() if averaged else along.min()
                off.append(abs(predicted - found.log_breakdown(label, everyone)))
            return float(np.exp(np.mean(off)))

        ranked = sorted(PREDICTORS, key=distance)
        return ", ".join(f"{predictor} by a factor of {distance(predictor):.2g}" for predictor in ranked)

    return (
        f"Distances of predictions from what is measured, the smallest batch size with {found.settings.broken:g} times "
        f"the loss, or the largest there is: {distances(averaged=False)}; geometric means over {len(found.plain)} "
        "methods. With the mean over the looks at a run, in place of the look where a prediction is smallest: "
        f"{distances(averaged=True)}."
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
        f"{'; '.join(map(told, found.plain))}; below 1 the run at the tuning batch size is inside of the edge."
    )


def _kept(found: Analysis) -> str:
    largest = found.sizes[-1]
    told = ", ".join(f"{label} {found.kept(label, largest, found.home)}" for label in found.labels)
    return (
        f"At B = {largest}, the learning rate tuned at B = {found.home} instead of one tuned there makes the training "
        f"loss so many times as high: {told}."
    )
