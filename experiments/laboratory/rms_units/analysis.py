"""What other units do to each step: exactly, step for step, and to the final loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.rms_units.runs import step_counts
from experiments.laboratory.schemas import RmsUnitsConfig

EXPONENTS = (0.5, 1.0)
LABELS = {0.5: "g/sigma", 1.0: "g/sigma^2"}
UNITS = ("original", "weights", "loss")
UNIT_LABELS = {
    "original": "original units",
    "weights": "other units of the weights",
    "loss": "another unit of the loss",
}


@dataclass(frozen=True)
class Analysis:
    """log_loss: ln of the final loss (S, X, U, K, F): seed, exponent, units, learning rate in octaves from the
    configuration's, floor; lrs: (X, K).

    deviation: of predictions from those in the original units, by exponent, units, and whether the floor follows the
    units: (S, T), at each of `steps`.
    """

    settings: RmsUnitsConfig
    log_loss: Array
    lrs: Array
    floors: tuple[float, ...]
    deviation: dict[tuple[float, str, bool], Array]
    steps: tuple[int, ...]

    def chosen(self, exponent: float, units: str) -> tuple[int, int]:
        """Learning rate and floor, as indices."""
        return best(self.log_loss, exponent, units)

    def loss(self, exponent: float, units: str, tuned_in: str) -> Estimate:
        """Final loss in some units, at the values tuned in the same or others."""
        return over_seeds(self.log_loss, lambda rows: float(np.exp(at(rows, exponent, units, tuned_in))))

    def price(self, exponent: float, units: str) -> Estimate:
        """Final loss in these units, at the values tuned in the original ones, over that in the original ones."""
        return over_seeds(self.log_loss, lambda rows: float(np.exp(log_price(rows, exponent, units))))

    def ratio(self, units: str) -> Estimate:
        """Final loss of g/sigma^2 over that of g/sigma, each tuned in these units."""
        return over_seeds(
            self.log_loss, lambda rows: float(np.exp(at(rows, 1.0, units, units) - at(rows, 0.5, units, units)))
        )

    def largest(self, exponent: float, units: str, floor_in_units: bool) -> float:
        """Deviation, over seeds and steps."""
        return float(self.deviation[exponent, units, floor_in_units].max())


def best(rows: Array, exponent: float, units: str) -> tuple[int, int]:
    grid = rows[:, EXPONENTS.index(exponent), UNITS.index(units)].mean(0)
    lr, floor = np.unravel_index(grid.argmin(), grid.shape)
    return int(lr), int(floor)


def at(rows: Array, exponent: float, units: str, tuned_in: str) -> float:
    """Mean of ln loss (S, X, U, K, F) over seeds; so every resample is tuned anew."""
    lr, floor = best(rows, exponent, tuned_in)
    return float(rows[:, EXPONENTS.index(exponent), UNITS.index(units), lr, floor].mean())


def log_price(rows: Array, exponent: float, units: str) -> float:
    """What other units add to the mean of ln loss, at the values tuned in the original ones."""
    return at(rows, exponent, units, "original") - at(rows, exponent, "original", "original")


def analyse(settings: RmsUnitsConfig, results: Sequence[Result]) -> Analysis:
    """Raises ValueError unless the results are whole grids."""
    trained = [r for r in results if "steps" not in r.coordinates]
    compared = [r for r in results if "steps" in r.coordinates]
    # Learning rates differ between exponents, and have a grid each.
    cubes = [cube(trained, ("seed", "units", "lr", "floor"), np.log, exponent=x) for x in EXPONENTS]
    if any(c.axes["units"] != UNITS for c in cubes) or len({c.values.shape for c in cubes}) > 1:
        raise ValueError(f"results are no grid of {EXPONENTS} and {UNITS}")
    deviation = {
        (x, units, follows): cube(compared, ("seed",), np.array, exponent=x, units=units, floor_in_units=follows).values
        for x in EXPONENTS
        for units in UNITS[1:]
        for follows in (True, False)
    }
    return Analysis(
        settings,
        np.stack([c.values for c in cubes], axis=1),
        np.array([c.numbers("lr") for c in cubes]),
        cubes[0].numbers("floor"),
        deviation,
        tuple(step_counts(settings.steps)),
    )
