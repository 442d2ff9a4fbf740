"""How fast the gradient drifts against its noise, and whether that says which momentum is best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.estimate import Array, Estimate, Finding, Verdict, at_edge, notes, over_seeds, ratio_of_means
from experiments.laboratory.drift.analysis import Analysis, crossing, tuned_loss
from experiments.laboratory.drift.follow import IN_UNITS, WHOLE
from experiments.laboratory.verdicts import within

SLOW = 0.1  # drift in a step, over the noise of a batch
HELPS = 0.5  # squared error of an average, over that of a batch
INDEPENDENT = 0.25  # of the noise of an average to that of independent batches
CLOSE = 0.25  # of a squared error to the least: around its best horizon the error is flat


def findings(found: Analysis) -> list[Finding]:
    return [
        _slow(found),
        *_helps(found),
        _closest(found),
        _grows(found),
        _layers(found),
        _scatter(found),
        *_momentum(found),
    ]


def _phases(found: Analysis, told: Callable[[int], object]) -> str:
    """What holds in each phase."""
    return ", ".join(f"{told(i)} from {a:,} to {b:,} examples" for i, (a, b) in enumerate(found.bounds))


def _worst(estimates: list[Estimate]) -> Estimate:
    return max(estimates, key=lambda estimate: estimate.value)


def _slow(found: Analysis) -> Finding:
    B = found.batch_size

    def ratio(phase: int) -> Estimate:
        moved, noise = found.drift(WHOLE, phase)[:, 0], found.noise_of_batch(WHOLE, phase)
        return ratio_of_means(moved, noise)

    ratios = [ratio(phase) for phase in range(len(found.bounds))]
    return Finding(
        f"The gradient drifts slowly: within a step of B = {B} it changes by less than {SLOW:g} of the noise of a "
        "batch, in squared norm",
        _worst(ratios).verdict(SLOW),
        f"||g(E + {B}) - g(E)||^2 over tr Sigma / {B} is {_phases(found, lambda phase: ratios[phase])}.",
    )


def _helps(found: Analysis) -> list[Finding]:
    def ratio(phase: int, other: Array) -> Estimate:
        both = np.concatenate([found.curve("error", WHOLE, phase), other[:, None]], axis=1)
        return over_seeds(both, lambda v: float(v[:, :-1].mean(axis=0).min() / v[:, -1].mean()))

    phases = range(len(found.bounds))
    to_batch = [ratio(phase, found.noise_of_batch(WHOLE, phase)) for phase in phases]
    to_zero = [ratio(phase, found.signal(WHOLE, phase)) for phase in phases]
    return [
        Finding(
            "A running average helps: at its best horizon it is closer to the gradient than a batch is, by "
            f"{HELPS:g} or less of the squared error",
            _worst(to_batch).verdict(HELPS),
            f"Its error is {_phases(found, lambda phase: to_batch[phase])} of tr Sigma / B.",
        ),
        Finding(
            "At its best horizon a running average is closer to the gradient than zero is",
            _worst(to_zero).verdict(1.0),
            f"Its error is {_phases(found, lambda phase: to_zero[phase])} of ||g||^2. Where that is not below 1, "
            "the average tells no more of the gradient than zero.",
        ),
    ]


def _judged(found: Analysis, verdict: Verdict, *horizons: Estimate) -> Verdict:
    """Not where a horizon lies at an end of those that were measured, and may be anywhere beyond."""
    ends = (found.lengths[0], found.lengths[-1])
    return "cannot be judged" if any(horizon.value in ends for horizon in horizons) else verdict


def _at_crossing(found: Analysis, phase: int) -> Estimate:
    """The error of the average where drift equals noise, over the least error of all."""
    kinds = [found.drift(WHOLE, phase), found.expected_scatter(WHOLE, phase), found.curve("error", WHOLE, phase)]

    def statistic(rows: Array) -> float:
        drift, scatter, error = rows.mean(axis=0)
        here = np.log(crossing(found.lengths, drift, scatter))
        return float(np.exp(np.interp(here, np.log(found.lengths), np.log(error))) / error.min())

    return over_seeds(np.stack(kinds, axis=1), statistic)


def _closest(found: Analysis) -> Finding:
    phases = range(len(found.bounds))
    ratios, crossings = [_at_crossing(found, i) for i in phases], [found.crossing(WHOLE, i) for i in phases]
    told = _phases(found, lambda i: f"N = {crossings[i]}, {ratios[i]} times that at N = {found.tracking(WHOLE, i)},")
    return Finding(
        "Where drift over N examples equals the noise of the average of horizon N, that average is as close to the "
        f"gradient as any, within {CLOSE:.0%} of the least squared error",
        _judged(found, _worst(ratios).verdict(1 + CLOSE), *crossings),
        f"Where they are equal, and how the error is there, against the least: {told}.",
    )


def _grows(found: Analysis) -> Finding:
    last = len(found.bounds) - 1
    curves = [curve(WHOLE, phase) for phase in (0, last) for curve in (found.drift, found.expected_scatter)]

    def statistic(rows: Array) -> float:
        drift, scatter, drift_at_last, scatter_at_last = rows.mean(axis=0)
        return crossing(found.lengths, drift, scatter) / crossing(found.lengths, drift_at_last, scatter_at_last)

    ratio = over_seeds(np.stack(curves, axis=1), statistic)
    crossings = [found.crossing(WHOLE, phase) for phase in range(last + 1)]
    return Finding(
        "The horizon where drift equals noise grows along training",
        _judged(found, ratio.verdict(1.0), crossings[0], crossings[-1]),
        f"It is {_phases(found, lambda phase: crossings[phase])}: the first is {ratio} of the last.",
    )


def _layers(found: Analysis) -> Finding:
    layers = [group for group in found.groups if group not in (WHOLE, IN_UNITS)]
    last = len(found.bounds) - 1
    curves = np.array([[found.drift(group, last), found.expected_scatter(group, last)] for group in layers])

    def spread(rows: Array) -> float:
        best = [crossing(found.lengths, drift, scatter) for drift, scatter in rows.mean(axis=0)]
        return max(best) / min(best)

    apart = over_seeds(np.moveaxis(curves, 2, 0), spread)
    crossings = [found.crossing(group, last) for group in layers]
    told = ", ".join(f"{horizon} for {group}" for horizon, group in zip(crossings, layers, strict=True))
    return Finding(
        "Drift equals noise at the same horizon in all layers, within a factor of 2",
        _judged(found, apart.verdict(2.0), *crossings),
        f"In the last phase it is {told}: apart by a factor of {apart}.",
    )


def _scatter(found: Analysis) -> Finding:
    last = len(found.bounds) - 1
    measured, expected = found.curve("scatter", WHOLE, last), found.expected_scatter(WHOLE, last)
    ratios = [ratio_of_means(measured[:, i], expected[:, i]) for i in range(len(found.lengths))]
    worst = max(ratios, key=lambda ratio: abs(np.log(ratio.value)))
    told = ", ".join(f"{ratio.text()} at N = {n}" for ratio, n in zip(ratios, found.lengths, strict=True))
    return Finding(
        f"The noise of an average is that of independent batches, about tr Sigma / (2 N), within {INDEPENDENT:.0%}",
        within(worst, 1 - INDEPENDENT, 1 + INDEPENDENT),
        f"In the last phase it is {told} times that; furthest off: {worst}. Within an epoch examples do not repeat, "
        "which takes noise away from averages as long as an epoch.",
    )


def _momentum(found: Analysis) -> list[Finding]:
    s, last = found.settings, len(found.bounds) - 1
    horizons = np.array(s.horizons)
    losses = tuned_loss(found.loss.values)
    predicted = found.crossing(IN_UNITS, last)
    nearest = int(np.abs(np.log(horizons / predicted.value)).argmin())
    cost = over_seeds(found.loss.values, lambda v: float(tuned_loss(v)[nearest] / tuned_loss(v).min()) - 1)

    def ratio(rows: Array) -> float:
        """Tuning is repeated in every resample."""
        of = rows.astype(int)
        best = int(tuned_loss(found.loss.values[of]).argmin())
        drift, scatter = (curve(IN_UNITS, last, best)[of] for curve in (found.drift, found.expected_scatter))
        return float(horizons[best] / crossing(found.lengths, drift.mean(axis=0), scatter.mean(axis=0)))

    factor = over_seeds(np.arange(len(s.seeds), dtype=float), ratio)
    told = ", ".join(f"{loss:.3g} at {n}" for n, loss in zip(s.horizons, losses, strict=True))
    range_of = (0, len(s.lr_multipliers) - 1)
    edges = [f"N = {n}" for n, lr in zip(s.horizons, found.tuned, strict=True) if lr in range_of]
    remarks = at_edge("lr", edges)
    verdict = _judged(found, within(factor, 0.25, 4.0), predicted)
    if found.best in (0, len(s.horizons) - 1):
        # The best of all may be further away from the prediction, if it does not lie on the other side of it.
        verdict = "cannot be judged" if verdict == "holds" else verdict
        remarks.append(f"The best horizon, {s.horizons[found.best]}, lies at an edge of the grid of horizons.")
    return [
        Finding(
            "The horizon where drift equals noise (elements in units of their noise) is that of the best momentum, "
            "within a factor of 4",
            verdict,
            f"Final training losses, each at its tuned learning rate, are {told}. The best is N = "
            f"{s.horizons[found.best]}; along its run drift equals noise at N = {predicted} in the last phase: a ratio "
            f"of {factor}. Momentum of N = {s.horizons[nearest]}, the nearest of the grid, has a loss {cost} above the "
            "lowest, in parts of it.",
        ),
        *notes(remarks),
    ]
