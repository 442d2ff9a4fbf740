"""What each variant reaches when it is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.bias_correction.moments import VARIANTS
from experiments.laboratory.bias_correction.runs import POINTS
from experiments.laboratory.digits import examples, log_spaced
from experiments.laboratory.schemas import BiasCorrectionConfig


@dataclass(frozen=True)
class Goal:
    """point: of the learning curve; warmups: how many of the grid may be chosen from, the first of which is none."""

    label: str
    point: int
    warmups: int


@dataclass(frozen=True)
class Analysis:
    """log_loss: ln of the training loss (S, V, W, K, T): seed, variant, warm-up, learning rate, point of the curve."""

    settings: BiasCorrectionConfig
    log_loss: Array
    warmups: tuple[float, ...]
    lrs: tuple[float, ...]
    counts: tuple[int, ...]
    goals: tuple[Goal, ...]

    def at(self, goal: Goal) -> Array:
        """ln loss (S, V, W, K), of the warm-ups that may be chosen."""
        rows: Array = self.log_loss[:, :, : goal.warmups, :, goal.point]
        return rows

    def chosen(self, variant: str, goal: Goal) -> tuple[int, int]:
        """Warm-up and learning rate, as indices."""
        grid = self.at(goal)[:, ROW[variant]].mean(0)
        warmup, lr = np.unravel_index(grid.argmin(), grid.shape)
        return int(warmup), int(lr)

    def loss(self, variant: str, goal: Goal) -> Estimate:
        return over_seeds(self.at(goal)[:, ROW[variant]], lambda rows: float(np.exp(rows.mean(0).min())))

    def ratio(self, variant: str, other: str, goal: Goal) -> Estimate:
        """Loss of the one over that of the other."""

        def quotient(rows: Array) -> float:
            mine, others = tuned(rows, variant, other)
            return float(np.exp(mine - others))

        return over_seeds(self.at(goal), quotient)

    def unexplained(self, goal: Goal) -> Estimate:
        """Of RMSProp's ln loss above Adam's, the part that correction leaves, minus a half of the whole."""

        def difference(rows: Array) -> float:
            adam, rmsprop, corrected = tuned(rows, "adam", "rmsprop", "rmsprop_both")
            return corrected - adam - (rmsprop - adam) / 2

        return over_seeds(self.at(goal), difference)


ROW = {name: i for i, name in enumerate(VARIANTS)}


def tuned(rows: Array, *variants: str) -> tuple[float, ...]:
    """The lowest mean of ln loss over the grid, of rows (S, V, W, K); so every resample is tuned anew."""
    mean = rows.mean(0)
    return tuple(float(mean[ROW[variant]].min()) for variant in variants)


def analyse(settings: BiasCorrectionConfig, results: Sequence[Result]) -> Analysis:
    """Early is the count of examples that is nearest. Raises ValueError unless the results are a whole grid."""
    found = cube(results, ("seed", "variant", "warmup", "lr"), np.log)
    if found.axes["variant"] != tuple(VARIANTS):
        raise ValueError(f"results of {found.axes['variant']}, not of {tuple(VARIANTS)}")
    warmups, lrs = (found.numbers(name) for name in ("warmup", "lr"))
    counts = log_spaced(settings.batch_size, settings.epochs, POINTS)
    point = int(np.abs(np.array(counts) - settings.early_epochs * len(examples())).argmin())
    goals = tuple(
        Goal(f"{when}, {how}", at, number)
        for when, at in (("Final loss", len(counts) - 1), (f"Loss after {counts[point]:,} examples", point))
        for how, number in (("no warm-up", 1), ("warm-up tuned", len(warmups)))
    )
    return Analysis(settings, found.values, warmups, lrs, tuple(counts), goals)
