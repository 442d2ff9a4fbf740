"""What the results say about the learning rate as a temperature."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from experiments.estimate import Array, Finding, at_edge, listed, notes, over_seeds, ratio_of_means
from experiments.laboratory.deviation import largest_deviation
from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.temperature.analysis import (
    ENSEMBLES,
    Analysis,
    equal_temperatures,
    expected_excesses,
    largest_spread,
    temperatures,
)
from experiments.laboratory.verdicts import within

CLOSE = 0.05  # of a variance to its closed form
CLOSE_ON_DATA = 0.1  # of an excess loss to what its minimum foretells; and of curves, in ln(loss)


def findings(found: Analysis) -> list[Finding]:
    return [
        _variance(found),
        *(_one_temperature(found, h) for h in found.settings.curvatures),
        _excess(found),
        _proportional(found),
        _excess_at_equal_temperature(found),
        *_annealing(found),
        *_snapshots(found),
    ]


def _variance(found: Analysis) -> Finding:
    s = found.settings
    expected = np.array(
        [
            [[stationary_variance(rate, s.noise**2 / B, h) for B in s.batch_sizes] for rate in s.rates]
            for h in s.curvatures
        ]
    )
    off = largest_deviation(found.variance.values, expected)
    return Finding(
        f"On a quadratic the stationary variance is eta sigma^2 / (B h (2 - eta h)), within {CLOSE:.0%}",
        off.verdict(CLOSE),
        f"Over eta from {min(s.rates):g} to {max(s.rates):g}, B from {min(s.batch_sizes)} to {max(s.batch_sizes)} and "
        f"h in {listed(s.curvatures)} it is off by {off} of itself at most.",
    )


def _one_temperature(found: Analysis, curvature: float) -> Finding:
    s = found.settings
    cells = equal_temperatures(s.rates, s.batch_sizes)
    spread = over_seeds(found.variance.at(curvature=curvature), lambda v: largest_spread(v, cells))
    largest = max(s.rates[i] for where in cells.values() for i, _ in where) * curvature
    return Finding(
        f"On a quadratic of curvature {curvature:g}, runs of equal eta/B have equal variances, within "
        f"{CLOSE_ON_DATA:.0%}",
        spread.verdict(CLOSE_ON_DATA),
        f"They differ by {spread} at most, where eta h goes up to {largest:g}: the temperature is eta/B where eta h is "
        "small, and (2 - eta h) adds to it elsewhere.",
    )


def _excess(found: Analysis) -> Finding:
    expected, heat = expected_excesses(found), temperatures(found)
    off = largest_deviation(found.excess.values, expected)
    ratio = found.excess.values.mean(axis=0) / expected
    wrong = heat[np.abs(ratio - 1) > CLOSE_ON_DATA]
    right = heat[heat < wrong.min()] if len(wrong) else heat
    sentence = (
        f"It is off by {off} of itself at most, and is {ratio.ravel()[heat.argmax()]:.3g} times what is foretold "
    )
    sentence += f"at the highest eta/B, {heat.max():.3g}."
    if len(wrong) and len(right):
        sentence += f" Up to eta/B = {right.max():.3g} it is within {CLOSE_ON_DATA:.0%} everywhere."
    return Finding(
        "On the data, a softmax regression with a penalty, the excess loss is what Hessian and gradient noise at its "
        f"minimum foretell, within {CLOSE_ON_DATA:.0%}",
        off.verdict(CLOSE_ON_DATA),
        sentence + f" At the minimum tr Sigma is {found.trace:.4g} (gradstats), the largest curvature "
        f"{found.curvatures.max():.3g}; nothing is fitted.",
    )


def _slope(found: Analysis) -> Callable[[Array], float]:
    heat = np.log(temperatures(found).ravel())
    return lambda rows: float(np.polyfit(heat, np.log(rows.mean(axis=0).ravel()), 1)[0])


def _proportional(found: Analysis) -> Finding:
    slope, heat = over_seeds(found.excess.values, _slope(found)), temperatures(found)
    return Finding(
        "On the data, the excess loss is proportional to eta/B: a slope of 1 in logarithms, within 0.1",
        within(slope, 0.9, 1.1),
        f"The slope is {slope}, over eta/B from {heat.min():.2g} to {heat.max():.2g}.",
    )


def _excess_at_equal_temperature(found: Analysis) -> Finding:
    s = found.settings
    cells = equal_temperatures(s.well_rates, s.well_batch_sizes)
    spread = over_seeds(found.excess.values, lambda v: largest_spread(v, cells))
    told = ", ".join(f"{largest_spread(found.excess.values, {t: where}):.0%} at {t:.2g}" for t, where in cells.items())
    return Finding(
        f"On the data, runs of equal eta/B have equal excess losses, within {CLOSE_ON_DATA:.0%}",
        spread.verdict(CLOSE_ON_DATA),
        f"They differ by {spread} at most (by eta/B: {told}).",
    )


def _annealing(found: Analysis) -> list[Finding]:
    s = found.settings
    last = s.factor ** (s.stages - 1)
    constant, decayed, kept, smith = (False, False), (True, False), (False, True), (True, True)
    return [
        _same_curve(
            found,
            smith,
            decayed,
            "Growing the batch instead of decaying the learning rate gives the same curve against examples, within "
            f"{CLOSE_ON_DATA} in ln(training loss)",
            f"In {found.steps[smith] / found.steps[decayed]:.0%} of the steps.",
        ),
        _same_curve(
            found,
            kept,
            constant,
            f"Growing the batch by {last} at the same learning rate per example, hence at the same eta/B, changes "
            f"nothing, within {CLOSE_ON_DATA} in ln(training loss)",
            f"The step is {last} times as long at the end: where that is not stable, eta/B is no temperature.",
        ),
    ]


def _same_curve(found: Analysis, way: tuple[bool, bool], other: tuple[bool, bool], bar: str, ending: str) -> Finding:
    """Judged at the learning rate where the two are furthest apart."""
    s = found.settings
    gaps = [over_seeds(found.apart(way, other, i)) for i in range(len(s.lr_multipliers))]
    worst = max(gaps, key=lambda gap: gap.value)
    told = ", ".join(f"{gap} at {x:g}" for gap, x in zip(gaps, s.lr_multipliers, strict=True))
    effect = ", ".join(
        f"{found.apart((False, False), (True, False), i).mean():.2g}" for i in range(len(s.lr_multipliers))
    )
    floor = ", ".join(f"{_between_seeds(found, other, i):.2g}" for i in range(len(s.lr_multipliers)))
    return Finding(
        bar,
        worst.verdict(CLOSE_ON_DATA),
        f"Curves are apart by {told} times the method's lr, mean after the first stage (between seeds: {floor}; a "
        f"decay of the learning rate moves them by {effect}). {ending}",
    )


def _between_seeds(found: Analysis, way: tuple[bool, bool], lr: int) -> float:
    late = np.array(found.examples) > found.settings.stage
    curves = np.log(found.curve.at(decays=way[0], grows=way[1])[:, lr][:, late])
    return float(np.mean([np.abs(a - b).mean() for a, b in pairwise(curves)])) if len(curves) > 1 else np.nan


def _snapshots(found: Analysis) -> list[Finding]:
    s = found.settings
    best = [found.tuned(i) for i in range(len(ENSEMBLES))]
    rows = found.tested.values
    loss = [rows[:, lr, i, 1] for i, lr in enumerate(best)]
    accuracy = [over_seeds(rows[:, lr, i, 2]) for i, lr in enumerate(best)]
    gain = over_seeds(loss[0] - loss[3])
    cyclic, single, independent = (found.distance.values[:, best[0], i] for i in range(3))
    against_one, against_other = (ratio_of_means(others, cyclic) for others in (single, independent))
    findings = [
        Finding(
            f"An ensemble of the snapshots of {s.members} cycles has a lower test loss than one run of as many "
            "examples",
            gain.verdict(0.0),
            f"{over_seeds(loss[0])} against {over_seeds(loss[3])}: a difference of {gain}. The last snapshot alone has "
            f"{over_seeds(loss[1])}, an ensemble along the one run {over_seeds(loss[2])}; accuracies are "
            f"{accuracy[0]} and {accuracy[3]}. Each has the learning rate with its lowest validation loss.",
        ),
        Finding(
            "Cycles explore: their snapshots are further apart in function space than models of one run without cycles "
            "at the same counts of examples",
            against_one.verdict(1.0),
            f"At {s.lr_multipliers[best[0]]:g} times the method's lr the mean distance is {over_seeds(cyclic)} along "
            f"cycles and {over_seeds(single)} along one run: a ratio of {against_one}.",
        ),
        Finding(
            "Snapshots are as far apart as the ends of independent runs",
            against_other.verdict(1.0),
            f"The distance between runs of different seeds is {over_seeds(independent)}: {against_other} of that "
            "between snapshots.",
        ),
    ]
    edges = {0, len(s.lr_multipliers) - 1}
    names = [name for name, lr in zip(ENSEMBLES, best, strict=True) if lr in edges]
    return [*findings, *notes(at_edge("lr", names))]
