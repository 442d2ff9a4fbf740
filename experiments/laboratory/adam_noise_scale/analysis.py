"""Tuned learning rates over the batch size, the peak that is fitted to them, and the one that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from experiments.contest.analysis import Contest, contest
from experiments.contest.followed import runs_of
from experiments.cube import cube
from experiments.estimate import Array, Estimate, Rows
from experiments.jobs import Result
from experiments.laboratory.adam_noise_scale.measure import PARTS, SIZES
from experiments.laboratory.knee import Knee, fitted, surge_law
from experiments.laboratory.schemas import AdamNoiseScaleConfig
from experiments.parabola import lowest_point

ADAM, SIGN, OURS = "Adam", "sign of the batch", "R = 1"
LAWFUL = (ADAM, SIGN)  # the law is of the sign, and said to be Adam's
HESSIAN, EXACT_MEAN, SIMPLE, ONLINE = "with the Hessian", "any B", "without the Hessian", "online"
KINDS = (HESSIAN, EXACT_MEAN, SIMPLE, ONLINE)


@dataclass(frozen=True)
class Analysis:
    """followed: of a contestant at T counts of examples, each part (S, T, ...)."""

    settings: AdamNoiseScaleConfig
    contest: Contest
    followed: dict[str, dict[str, Array]]

    def octaves(self, label: str, rows: Rows) -> Array:
        """log2 of the tuned learning rate over its default, at each batch size."""
        return np.array([self.contest.best_octave(label, B, rows) for B in self.settings.batch_sizes])

    def lr(self, label: str, B: int) -> Estimate:
        runs = self.contest.runs[label, B]
        default = float(runs.lr[0] / 2 ** runs.octaves[0])
        return self.contest.over_log(lambda r: np.log(default) + np.log(2) * self.contest.best_octave(label, B, r))

    def knee(self, label: str, rows: Rows) -> Knee:
        """The law, fitted to the tuned learning rates."""
        return fitted(surge_law, self.settings.batch_sizes, np.log(2) * self.octaves(label, rows))

    def peak(self, label: str) -> int:
        """The position of the batch size with the highest tuned learning rate."""
        return int(self.octaves(label, self.contest.everyone).argmax())

    def slope(self, label: str, sizes: slice, rows: Rows) -> float:
        """Of ln lr over ln B, by least squares."""
        B = np.log2(np.array(self.settings.batch_sizes[sizes], dtype=float))
        return float(np.polyfit(B, self.octaves(label, rows)[sizes], 1)[0])

    def measured(self, label: str, kind: str, rows: Rows) -> float:
        """B_noise of one learning rate for the whole run: the best is the sum over the run of numerators over that of
        denominators, so both are summed. Not a number where there is no peak."""
        of = self.followed[label]

        def total(part: str) -> Array:
            sums: Array = of[part][rows].sum(axis=(0, 1))
            return sums

        match kind:
            case "with the Hessian":
                top, below = total("trace"), total("apart")
            case "without the Hessian":
                top, below = total("sigma2"), total("mu2")
            case "online":
                top, below = total("online_sigma2"), total("online_mu2")
            case _:
                return peak_of(total("gain"), total("curvature"))
        return float(np.pi / 2 * top / below) if top > 0 and below > 0 else float("nan")

    def size(self, label: str, kind: str) -> Estimate:
        return self.contest.over_finite(lambda rows: self.measured(label, kind, rows))

    def fitted_size(self, label: str) -> Estimate:
        return self.contest.over_finite(lambda rows: self.knee(label, rows).size)

    def ratio(self, label: str, kind: str) -> Estimate:
        """Measured over fitted."""
        return self.contest.over_finite(lambda rows: self.measured(label, kind, rows) / self.knee(label, rows).size)


def peak_of(gain: Array, curvature: Array) -> float:
    """Where gain / curvature is highest over SIZES, between them by a parabola; at an end, the end. Not a number where
    no learning rate is best."""
    if not ((gain > 0) & (curvature > 0)).all():
        return float("nan")
    return float(2 ** lowest_point(np.log2(np.array(SIZES, dtype=float)), curvature / gain))


def analyse(settings: AdamNoiseScaleConfig, results: Sequence[Result]) -> Analysis:
    """Raises ValueError unless the results are those of every contestant, batch size and seed."""
    followed: dict[str, dict[str, Array]] = {}
    for label in LAWFUL:
        of_one = [result for result in results if result.coordinates.get("followed") == label]
        if not of_one:
            raise ValueError(f"runs of {label} were not followed")
        parts = ("examples", *PARTS, "online_mu2", "online_sigma2")
        followed[label] = {part: cube(of_one, ["seed"], itemgetter(part)).values for part in parts}
    return Analysis(settings, contest(settings, runs_of(results)), followed)
