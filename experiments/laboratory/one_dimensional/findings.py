"""What runs in one dimension say about each claim, and their tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from experiments.cube import Cube
from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, Finding, listed, over_seeds
from experiments.laboratory.deviation import largest_deviation
from experiments.laboratory.one_dimensional.runs import LATE, counts
from experiments.laboratory.quadratic import left_for_ever, moments, power_rates, stationary_variance
from experiments.laboratory.schemas import OneDimensionalConfig

CLOSE = 0.05  # of a measured number to its closed form
EXACT = 1e-6
FALLS = 0.1  # at least this part of an error, where it still falls: what goes as t^-1/25 would be missed
FACTOR_STEPS = 16  # few enough that an error is not yet lost in rounding
EDGE = 2.0  # learning rate times curvature, where descent stops converging


@dataclass(frozen=True)
class Found:
    """Cubes with the seed in front: gradients (S, B); schedules (S, P, B, T, 2), mean and mean square of the error;
    exact (S, R, steps + 1); walk (S, B, T, 2), at the edge."""

    settings: OneDimensionalConfig
    gradients: Cube
    schedules: Cube
    exact: Cube
    walk: Cube

    def expected(self, power: float, batch_size: int) -> tuple[Array, Array]:
        """Mean and mean square of the error in closed form, at `counts`."""
        s = self.settings
        return self._at_counts(power_rates(s.scale, power, s.steps), batch_size)

    def expected_walk(self, batch_size: int) -> tuple[Array, Array]:
        return self._at_counts(power_rates(EDGE, 0, self.settings.rate_steps), batch_size)

    def _at_counts(self, rates: Array, batch_size: int) -> tuple[Array, Array]:
        mean, variance = moments(rates, self.settings.noise**2 / batch_size, self.settings.start)
        at = np.array(counts(len(rates))) - 1
        return mean[at], (mean**2 + variance)[at]

    def falls(self, power: float, batch_size: int) -> Estimate:
        """The part of the error (root mean square) that is gone over the last factor LATE of steps."""
        noted = counts(self.settings.steps)
        square = self.schedules.at(power=power, batch_size=batch_size)[..., 1]  # (S, T)
        early, last = noted.index(self.settings.steps // LATE), noted.index(self.settings.steps)
        return over_seeds(square, lambda v: float(1 - np.sqrt(v[:, last].mean() / v[:, early].mean())))

    def error(self, power: float, batch_size: int) -> Estimate:
        """Root mean square of it, at the end."""
        return over_seeds(
            self.schedules.at(power=power, batch_size=batch_size)[:, -1, 1], lambda v: float(np.sqrt(v.mean()))
        )


def conditions(power: float) -> tuple[bool, bool]:
    """Whether the sum of c / t^p is infinite, and whether that of its squares is finite."""
    return power <= 1, power > 0.5


def findings(found: Found) -> list[Finding]:
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


def _gradient(found: Found) -> Finding:
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


def _closed_forms(found: Found) -> Finding:
    s = found.settings
    expected = np.array([[found.expected(p, B)[1] for B in s.batch_sizes] for p in s.powers])
    deviation = largest_deviation(found.schedules.values[..., 1], expected)
    return Finding(
        f"Mean square errors follow m_t^2 + v_t, of the recursions of mean and variance, within {CLOSE:.0%}",
        deviation.verdict(CLOSE),
        f"Over all steps, {len(s.powers)} schedules and B in {listed(s.batch_sizes)} the largest "
        f"relative deviation is {deviation}.",
    )


def _falls(found: Found, power: float) -> list[Estimate]:
    """At every batch size, in ascending order."""
    return sorted((found.falls(power, B) for B in found.settings.batch_sizes), key=lambda fall: fall.value)


def _converges(found: Found, power: float) -> Finding:
    rest = _falls(found, power)[0]
    return Finding(
        f"{name(found, power)}, with an infinite sum and a finite sum of squares, converges: the error still falls by "
        f"{FALLS:.0%} over the last factor of {LATE} in steps",
        Estimate(-rest.value, -rest.high, -rest.low).verdict(-FALLS),
        f"It falls by {rest} at least.",
    )


def _stops_short(found: Found, power: float) -> Finding:
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


def _stays_noisy(found: Found, power: float) -> Finding:
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


def factors(found: Found, rate: float) -> Array:
    """|e_t+1 / e_t|, the geometric mean over FACTOR_STEPS steps, (S,)."""
    errors = np.abs(found.exact.at(rate=rate))
    return (errors[:, FACTOR_STEPS] / errors[:, 0]) ** (1 / FACTOR_STEPS)


def _edge(found: Found) -> list[Finding]:
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


def name(found: Found, power: float) -> str:
    scale = f"{found.settings.scale:g}"
    return f"eta = {scale}" if power == 0 else f"eta = {scale} / t" + ("" if power == 1 else f"^{power:g}")


def tables(found: Found) -> list[Table]:
    return [_schedules(found), _gradients(found), _rates(found)]


def _schedules(found: Found) -> Table:
    s = found.settings
    B = s.batch_sizes[0]
    rows: list[list[Cell]] = []
    for power in s.powers:
        endless, quiet = conditions(power)
        rows.append(
            [
                name(found, power),
                "infinite" if endless else "finite",
                "finite" if quiet else "infinite",
                found.error(power, B),
                f"{math.sqrt(found.expected(power, B)[1][-1]):.3g}",
                found.falls(power, B),
            ]
        )
    return Table(
        "Learning rates that decay",
        f"From a distance of {s.start:g}, with sigma = {s.noise:g}, at B = {B}: the error after {s.steps:,} steps, "
        f"what the closed form says, and the part of it that is gone over the last factor of {LATE} in steps.",
        ["learning rate", "sum", "sum of squares", "error", "closed form", "still falls by"],
        rows,
        tuple(i for i, power in enumerate(s.powers) if all(conditions(power))),
    )


def _gradients(found: Found) -> Table:
    s = found.settings
    rows: list[list[Cell]] = [
        [str(B), over_seeds(found.gradients.at(batch_size=B), _root), f"{s.noise / math.sqrt(B):.3g}"]
        for B in s.batch_sizes
    ]
    return Table(
        "The gradient at the minimum",
        "Root mean square of the gradient of a batch, where the gradient of the true loss is zero.",
        ["batch size", "measured", "sigma / sqrt(B)"],
        rows,
        (),
    )


def _rates(found: Found) -> Table:
    rows: list[list[Cell]] = [
        [f"{rate:g}", f"{float(factors(found, rate).mean()):.4g}", f"{abs(1 - rate):.4g}"]
        for rate in found.settings.rates
    ]
    return Table(
        "Constant learning rates without noise",
        f"By how much the size of the error is multiplied a step, on average over the first {FACTOR_STEPS}.",
        ["learning rate", "measured", "|1 - eta|"],
        rows,
        (),
    )
