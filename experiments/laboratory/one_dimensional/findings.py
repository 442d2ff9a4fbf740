"""What runs in one dimension say about each claim."""

from __future__ import annotations

import math

import numpy as np

from experiments.estimate import Array, Estimate, Finding, listed, over_seeds
from experiments.laboratory.deviation import largest_deviation
from experiments.laboratory.one_dimensional.analysis import EDGE, Analysis, conditions, factors, name
from experiments.laboratory.one_dimensional.runs import LATE
from experiments.laboratory.quadratic import left_for_ever, stationary_variance

CLOSE = 0.05  # of a measured number to its closed form
EXACT = 1e-6
FALLS = 0.1  # at least this part of an error, where it still falls: what goes as t^-1/25 would be missed


def findings(found: Analysis) -> list[Finding]:
    s = found.settings
    enough = [p for p in s.powers if conditions(p) == (True, True)]
    short = [p for p in s.powers if not conditions(p)[0]]
    noisy = [p for p in s.powers if not conditions(p)[1]]
    return [
        _gradient(found),
        _closed_forms(found),
        *(_converges(found, power) for power in enough),
        *(_stops_short(found, power) for power in short),
        *(_stays_noisy(found, power) for power in noisy),
        *_edge(found),
    ]


def _gradient(found: Analysis) -> Finding:
    s = found.settings
    expected = np.array([s.noise**2 / B for B in s.batch_sizes])
    deviation = largest_deviation(found.gradients.values, expected)
    told = ", ".join(
        f"{over_seeds(found.gradients.at(batch_size=B), _root)} at B = {B} (sigma / sqrt(B): "
        f"{s.noise / math.sqrt(B):.3g})"
        for B in s.batch_sizes
    )
    return Finding(
        f"At the minimum the squared gradient of a batch is not zero but sigma^2 / B on average, within {CLOSE:.0%}",
        deviation.verdict(CLOSE),
        f"Its root mean square is {told}. The square is off by {deviation} of itself at most.",
    )


def _root(rows: Array) -> float:
    return float(np.sqrt(rows.mean()))


def _closed_forms(found: Analysis) -> Finding:
    s = found.settings
    expected = np.array([[found.expected(p, B)[1] for B in s.batch_sizes] for p in s.powers])
    deviation = largest_deviation(found.schedules.values[..., 1], expected)
    return Finding(
        f"Mean square errors follow m_t^2 + v_t, of the recursions of mean and variance, within {CLOSE:.0%}",
        deviation.verdict(CLOSE),
        f"Over all steps, {len(s.powers)} schedules and B in {listed(s.batch_sizes)} the largest "
        f"relative deviation is {deviation}.",
    )


def _falls(found: Analysis, power: float) -> list[Estimate]:
    """At every batch size, in ascending order."""
    return sorted((found.falls(power, B) for B in found.settings.batch_sizes), key=lambda fall: fall.value)


def _converges(found: Analysis, power: float) -> Finding:
    rest = _falls(found, power)[0]
    return Finding(
        f"{name(found, power)}, with an infinite sum and a finite sum of squares, converges: the error still falls by "
        f"{FALLS:.0%} over the last factor of {LATE} in steps",
        Estimate(-rest.value, -rest.high, -rest.low).verdict(-FALLS),
        f"It falls by {rest} at least.",
    )


def _stops_short(found: Analysis, power: float) -> Finding:
    s, largest = found.settings, found.settings.batch_sizes[-1]
    fall = _falls(found, power)[-1]
    left = over_seeds(
        found.schedules.at(power=power, batch_size=largest)[:, -1, 0], lambda v: float(v.mean() / s.start)
    )
    limit = f" (for ever: {left_for_ever(s.scale):.3g})" if power == 2 else ""
    return Finding(
        f"{name(found, power)}, with a finite sum, stops short: the error falls by less than {FALLS:.0%} over the "
        f"last factor of {LATE} in steps",
        fall.verdict(FALLS),
        f"It falls by {fall} at most, and {left} of the distance at the start is left{limit}.",
    )


def _stays_noisy(found: Analysis, power: float) -> Finding:
    s = found.settings
    fall = _falls(found, power)[-1]
    sentence = f"It falls by {fall} at most."
    if power == 0:
        B = s.batch_sizes[0]
        limit = math.sqrt(stationary_variance(s.scale, s.noise**2 / B))
        sentence += (
            f" At B = {B} it stays at {found.error(power, B)}; sqrt(eta sigma^2 / (B (2 - eta))) is {limit:.3g}."
        )
    elif fall.low > FALLS:
        sentence += " A finite sum of squares is sufficient, not necessary: here eta_t going to 0 is enough."
    return Finding(
        f"{name(found, power)}, with an infinite sum of squares, does not converge: the error falls by less than "
        f"{FALLS:.0%} over the last factor of {LATE} in steps",
        fall.verdict(FALLS),
        sentence,
    )


def _edge(found: Analysis) -> list[Finding]:
    s = found.settings
    exact = []
    for claim, rates in (
        ("Without noise, eta below 2 converges, by |1 - eta| a step", [r for r in s.rates if r < EDGE]),
        ("Without noise, eta above 2 diverges, by |1 - eta| a step", [r for r in s.rates if r > EDGE]),
    ):
        if rates:
            off = max(float(np.abs(factors(found, rate) - abs(1 - rate)).max()) for rate in rates)
            told = ", ".join(f"{float(factors(found, rate).mean()):.4g} at eta = {rate:g}" for rate in rates)
            sentence = f"The factor a step is {told}; |1 - eta| is off by {off:.0e} at most."
            exact.append(Finding(f"{claim}, to six digits", "holds" if off < EXACT else "does not hold", sentence))
    errors = found.exact.at(rate=EDGE)
    cycle = float(np.abs(errors[:, 2:] / errors[:, :-2] - 1).max())
    change = float(np.abs(errors[:, 1:] / errors[:, :-1] + 1).max())
    exact.append(
        Finding(
            "Without noise, eta = 2 is a limit cycle of two steps: the error changes its sign and keeps its size, to "
            "six digits",
            "holds" if max(cycle, change) < EXACT else "does not hold",
            f"Over {s.rate_steps} steps the largest change within two steps is {cycle:.0e} of the error, and of its "
            f"size in one step {change:.0e}.",
        )
    )
    expected = np.array([found.expected_walk(B)[1] for B in s.batch_sizes])
    deviation = largest_deviation(found.walk.values[..., 1], expected)
    B = s.batch_sizes[0]
    end = over_seeds(found.walk.at(batch_size=B)[:, -1, 1], _root)
    return [
        *exact,
        Finding(
            "With noise there is no cycle at eta = 2, but a random walk: the mean square error grows by "
            f"4 sigma^2 / B a step, within {CLOSE:.0%}",
            deviation.verdict(CLOSE),
            f"At B = {B} the error goes from {s.start:g} to {end} in {s.rate_steps} steps; the mean square is off by "
            f"{deviation} of itself at most.",
        ),
    ]
