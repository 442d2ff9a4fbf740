"""Variances, excess losses, curves and ensembles, against what theory foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import Cube, cube
from experiments.estimate import Array
from experiments.jobs import Result
from experiments.laboratory.schemas import TemperatureConfig
from experiments.laboratory.temperature.wells import expected_excess

ENSEMBLES = ("cycles, ensemble", "cycles, last", "one run, ensemble", "one run, last")


@dataclass(frozen=True)
class Analysis:
    """Cubes with the seed in front: variance (S, curvature, rate, B); excess (S, rate, B); curve (S, lr, decays, grows,
    T); tested (S, lr, ENSEMBLES, 3), validation loss, loss and accuracy; distance (S, lr, 3), of cycles, of one run and
    of independent runs. The minimum is that of the well."""

    settings: TemperatureConfig
    variance: Cube
    excess: Cube
    curvatures: Array
    noise: Array
    trace: float
    curve: Cube
    examples: list[int]
    steps: dict[tuple[bool, bool], int]
    tested: Cube
    distance: Cube

    @property
    def seeds(self) -> int:
        return len(self.settings.seeds)

    def apart(self, one: tuple[bool, bool], other: tuple[bool, bool], lr: int) -> Array:
        """|ln of the ratio of losses| of two ways to anneal, after the first stage, (S, T)."""
        a, b = (np.log(self.curve.at(decays=way[0], grows=way[1])[:, lr]) for way in (one, other))
        late = np.array(self.examples) > self.settings.stage
        gap: Array = np.abs(a - b)[:, late]
        return gap

    def tuned(self, ensemble: int) -> int:
        """The position of the learning rate with the lowest validation loss, mean over seeds."""
        return int(self.tested.values[:, :, ensemble, 0].mean(axis=0).argmin())


def equal_temperatures(rates: Sequence[float], batch_sizes: Sequence[int]) -> dict[float, list[tuple[int, int]]]:
    """Positions (rate, batch size) by eta/B, of every eta/B that is there more than once."""
    cells: dict[float, list[tuple[int, int]]] = {}
    for i, rate in enumerate(rates):
        for j, B in enumerate(batch_sizes):
            cells.setdefault(float(f"{rate / B:.6g}"), []).append((i, j))
    return {temperature: where for temperature, where in sorted(cells.items()) if len(where) > 1}


def largest_spread(rows: Array, cells: dict[float, list[tuple[int, int]]]) -> float:
    """Over equal eta/B, of values (S, rate, B): the largest ratio of two means over seeds, less 1."""
    means = rows.mean(axis=0)
    return max(max(means[c] for c in where) / min(means[c] for c in where) for where in cells.values()) - 1


def expected_excesses(found: Analysis) -> Array:
    s = found.settings
    return np.array(
        [[expected_excess(found.curvatures, found.noise, rate, B) for B in s.well_batch_sizes] for rate in s.well_rates]
    )


def temperatures(found: Analysis) -> Array:
    s = found.settings
    return np.array([[rate / B for B in s.well_batch_sizes] for rate in s.well_rates])


def analyse(settings: TemperatureConfig, results: Sequence[Result]) -> Analysis:
    def with_(name: str) -> list[Result]:
        return [result for result in results if name in result.coordinates]

    annealed, cycled = with_("decays"), with_("cycles")
    well = [result for result in with_("penalty") if "rate" in result.coordinates]
    (minimum,) = (result.found for result in with_("penalty") if "rate" not in result.coordinates)
    return Analysis(
        settings,
        variance=cube(with_("curvature"), ["seed", "curvature", "rate", "batch_size"], float),
        excess=cube(well, ["seed", "rate", "batch_size"], float),
        curvatures=np.array(minimum["curvatures"]),
        noise=np.array(minimum["noise"]),
        trace=minimum["trace"],
        curve=cube(annealed, ["seed", "lr", "decays", "grows"], lambda found: found["loss"]),
        examples=annealed[0].found["examples"],
        steps={(bool(r.coordinates["decays"]), bool(r.coordinates["grows"])): r.found["steps"] for r in annealed},
        tested=cube(
            cycled,
            ["seed", "lr"],
            lambda found: [[found[name][key] for key in ("validation", "loss", "accuracy")] for name in ENSEMBLES],
        ),
        distance=cube(cycled, ["seed", "lr"], lambda found: list(found["distance"].values())),
    )
