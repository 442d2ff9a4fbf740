"""The tables of one_dimensional."""

from __future__ import annotations

import math

from experiments.documents import Cell, Table
from experiments.estimate import over_seeds
from experiments.laboratory.one_dimensional.analysis import FACTOR_STEPS, Analysis, conditions, factors, name
from experiments.laboratory.one_dimensional.findings import _root
from experiments.laboratory.one_dimensional.runs import LATE


def tables(found: Analysis) -> list[Table]:
    return [_schedules(found), _gradients(found), _rates(found)]


def _schedules(found: Analysis) -> Table:
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


def _gradients(found: Analysis) -> Table:
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


def _rates(found: Analysis) -> Table:
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


TERMS = {
    "Error": "The distance from the minimum of the true loss, as the root of its mean square over the runs of a seed.",
    "c / t^p": "The learning rate at step t. Its sum is infinite for p up to 1, and the sum of its squares is finite "
    "for p above 1/2.",
}
