"""Errors in one dimension, measured and in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import Cube, cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.one_dimensional.runs import LATE, counts
from experiments.laboratory.quadratic import moments, power_rates
from experiments.laboratory.schemas import OneDimensionalConfig

FACTOR_STEPS = 16  # few enough that an error is not yet lost in rounding
EDGE = 2.0  # learning rate times curvature, where descent stops converging


@dataclass(frozen=True)
class Analysis:
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


def factors(found: Analysis, rate: float) -> Array:
    """|e_t+1 / e_t|, the geometric mean over FACTOR_STEPS steps, (S,)."""
    errors = np.abs(found.exact.at(rate=rate))
    return (errors[:, FACTOR_STEPS] / errors[:, 0]) ** (1 / FACTOR_STEPS)


def name(found: Analysis, power: float) -> str:
    scale = f"{found.settings.scale:g}"
    return f"eta = {scale}" if power == 0 else f"eta = {scale} / t" + ("" if power == 1 else f"^{power:g}")


def errors(found: dict[str, list[float]]) -> Array:
    """Mean and mean square (T, 2)."""
    return np.stack([found["mean"], found["square"]], axis=-1)


def analyse(settings: OneDimensionalConfig, results: Sequence[Result]) -> Analysis:
    descents = [r for r in results if "power" in r.coordinates]
    others = [r for r in results if "power" not in r.coordinates]
    return Analysis(
        settings,
        cube([r for r in others if "batch_size" in r.coordinates], ["seed", "batch_size"], float),
        cube(descents, ["seed", "power", "batch_size"], errors, scale=settings.scale),
        cube([r for r in others if "rate" in r.coordinates], ["seed", "rate"], list),
        cube(descents, ["seed", "batch_size"], errors, scale=EDGE),
    )
