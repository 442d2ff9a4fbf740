"""Final loss over the learning rate and another hyperparameter, and how far its optimum moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, interval, resampled
from experiments.jobs import Result
from experiments.laboratory.schemas import DecouplingConfig
from experiments.record import Record

UNITS = ("torch", "examples")


@dataclass(frozen=True)
class Axis:
    """methods: torch's, and that in units of examples; members of the group `optimizer`."""

    label: str
    methods: tuple[str, str]


AXES = {
    "batch_size": Axis("batch size B", ("adam", "batch_invariant_adam_r1")),
    "momentum_horizon": Axis("horizon of SGD's momentum, N_g", ("batch_invariant_sgd", "batch_invariant_sgd_debiased")),
    "gradient_horizon": Axis("horizon of Adam's mean, N_g", ("adam", "batch_invariant_adam_r1")),
    "square_horizon": Axis("horizon of Adam's squares, N_s", ("adam", "batch_invariant_adam_r1")),
    "eps": Axis("Adam's eps", ("adam", "batch_invariant_adam_slides")),
}


@dataclass(frozen=True)
class HeatMap:
    """log_loss: (A, K), of value and learning rate, mean over seeds of natural logarithms.

    best_lr: at each value; drift: octaves between the highest and the lowest of them; slope: octaves an octave of the
    value, by least squares; edges: values whose lowest cell is the first or the last, so that the optimum may lie
    beyond.
    """

    values: tuple[float, ...]
    lrs: tuple[float, ...]
    log_loss: Array
    best_lr: tuple[Estimate, ...]
    drift: Estimate
    slope: Estimate
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Analysis:
    """maps: by axis and units; diverged: how many of the runs."""

    settings: DecouplingConfig
    maps: dict[str, dict[str, HeatMap]]
    runs: int
    diverged: int


def analyse(settings: DecouplingConfig, results: Sequence[Result]) -> Analysis:
    return Analysis(
        settings,
        {axis: {units: heat_map(results, axis, units) for units in UNITS} for axis in AXES},
        len(results),
        sum(result.found.status == "diverged" for result in results),
    )


def heat_map(results: Sequence[Result], axis: str, units: str) -> HeatMap:
    """Raises ValueError unless the results are a grid of seed, value and learning rate."""
    found = cube(results, ("seed", "value", "lr"), final_log_loss, axis=axis, units=units)
    values, lrs = (found.numbers(name) for name in ("value", "lr"))
    x, a = np.log2(lrs), np.log2(values)

    def optima(rows: Array) -> Array:
        return best(x, rows.mean(0))

    seeds, point = len(found.values), optima(found.values)[None]
    draws = resampled(found.values, optima) if seeds > 1 else point[:0]
    lowest = found.values.mean(0).argmin(1)

    def over_draws(statistic: Callable[[Array], Array]) -> Estimate:
        """Of log2 of the best learning rates, rows (draws, A)."""
        return interval(float(statistic(point)[0]), statistic(draws), seeds)

    return HeatMap(
        values,
        lrs,
        found.values.mean(0),
        tuple(learning_rate(interval(float(one), drawn, seeds)) for one, drawn in zip(point[0], draws.T, strict=True)),
        over_draws(lambda rows: np.ptp(rows, axis=1)),
        over_draws(lambda rows: rows @ (a - a.mean()) / ((a - a.mean()) ** 2).sum()),
        tuple(value for value, cell in zip(values, lowest, strict=True) if cell in (0, len(lrs) - 1)),
    )


def learning_rate(octave: Estimate) -> Estimate:
    """From its logarithm to base 2."""
    return Estimate(2**octave.value, 2**octave.low, 2**octave.high)


def final_log_loss(record: Record) -> float:
    """ln of the final training loss; of the initial one, for a run that ended above it."""
    return float(np.log(min(record.final_train_loss, record.train_loss[0])))


def best(x: Array, losses: Array) -> Array:
    """log2 of the best learning rate of each row, from (K,) evenly spaced and (A, K) to (A,).

    It is the minimum of a parabola, by least squares through the lowest cell and those within an octave of it: three
    where cells are an octave apart, five where they are half of one.
    """
    spacing = float(x[1] - x[0])
    reach = max(1, min(int(1 / spacing + 1e-9), (len(x) - 1) // 2))
    offsets = np.arange(-reach, reach + 1)
    lowest = losses.argmin(1)
    centre = lowest.clip(reach, len(x) - 1 - reach)
    around = np.take_along_axis(losses, centre[:, None] + offsets, axis=1)
    curvature, slope, _ = np.linalg.pinv(np.vander(offsets.astype(float), 3)) @ around.T
    convex = curvature > 0
    vertex = np.divide(-slope, 2 * curvature, out=(lowest - centre).astype(float), where=convex).clip(-reach, reach)
    found: Array = x[centre] + spacing * vertex
    return found
