"""Noise scales along the runs, and critical batch sizes: measured by steps to a loss, and told by the noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import getitem

import numpy as np

from experiments.contest.analysis import Contest, contest
from experiments.contest.followed import runs_of
from experiments.cube import cube
from experiments.estimate import Array, Estimate, Rows
from experiments.jobs import Result
from experiments.laboratory.knee import Knee, fitted, steps_law
from experiments.laboratory.noise_scale.arrivals import Arrivals, arrivals, reached
from experiments.laboratory.noise_scale.measure import METHODS, WHOLE
from experiments.laboratory.schemas import NoiseScaleConfig

NORM = "LayerNorm"


@dataclass(frozen=True)
class Followed:
    """Of one contestant, at T counts of examples: ln training loss (S, T); G2 and T of each group, exact (S, T, G, 2)
    and by method the mean of estimates (S, T, G, 2) and their spread (S, T, G)."""

    examples: tuple[int, ...]
    groups: tuple[str, ...]
    loss: Array
    exact: Array
    mean: dict[str, Array]
    spread: dict[str, Array]

    def scale(self, group: str = WHOLE) -> Array:
        """ln of the noise scale T / G2 over the training set, (S, T)."""
        of = self.exact[:, :, self.groups.index(group)]
        found: Array = np.log(of[..., 1] / of[..., 0])
        return found

    def told(self, target: float, batch_size: int) -> Array:
        """ln of `told_by_noise` of each run, (S,)."""
        runs = zip(self.loss, self.scale(), strict=True)
        told = [told_by_noise(self.examples, loss, scale, float(np.log(target)), batch_size) for loss, scale in runs]
        return np.log(told)


@dataclass(frozen=True)
class Analysis:
    """By contestant and target, arrivals: of each batch size; told_by_run: ln of the critical batch size that the noise
    scale along each followed run tells (S,), not a number of one that does not come to the target."""

    settings: NoiseScaleConfig
    contest: Contest
    followed: dict[str, Followed]
    arrivals: dict[tuple[str, float], list[Arrivals]]
    told_by_run: dict[tuple[str, float], Array]

    @property
    def layers(self) -> list[str]:
        return [group for group in next(iter(self.followed.values())).groups if group != WHOLE]

    @property
    def norms(self) -> list[str]:
        """Normalisation layers."""
        return [group for group in self.layers if group.endswith(NORM)]

    def bias(self, label: str, method: str, group: str, rows: Rows) -> float:
        """The noise scale of a method over the true one: of estimates over their true values, means over the run.

        Not the mean of ratios: an estimate of G2 may be close to zero, and below.
        """
        one = self.followed[label]
        g = one.groups.index(group)
        means = (one.mean[method][rows, :, g] / one.exact[rows, :, g]).mean(axis=(0, 1))
        return float(means[1] / means[0])

    def agreement(self, label: str, group: str) -> Estimate:
        """The noise scale of one pass over that of two batch sizes."""
        one, two = METHODS
        return self.contest.over(lambda r: self.bias(label, one, group, r) / self.bias(label, two, group, r))

    def spread(self, label: str, method: str, rows: Rows, group: str = WHOLE) -> float:
        """ln of the relative error of the noise scale of one draw, mean over the run."""
        one = self.followed[label]
        return float(np.log(one.spread[method][rows, :, one.groups.index(group)]).mean())

    def spread_ratio(self, label: str, group: str = WHOLE) -> Estimate:
        """Of one pass to two batch sizes."""
        one, two = METHODS
        return self.contest.over_log(
            lambda rows: self.spread(label, one, rows, group) - self.spread(label, two, rows, group)
        )

    def correlation(self, label: str, group: str) -> Estimate:
        """Pearson's, of ln noise scale of a group and of all, over the run."""
        one, all_of = self.followed[label].scale(group), self.followed[label].scale()

        def statistic(rows: Rows) -> float:
            return float(np.mean([np.corrcoef(one[s], all_of[s])[0, 1] for s in rows]))

        return self.contest.over(statistic)

    def share(self, label: str, group: str) -> Estimate:
        """Noise scale of a group over that of all, a geometric mean over the run."""
        ratio = self.followed[label].scale(group) - self.followed[label].scale()
        return self.contest.over_log(lambda rows: float(ratio[rows].mean()))

    def scale_at(self, label: str, look: int, group: str = WHOLE) -> Estimate:
        """The noise scale over the training set."""
        scale = self.followed[label].scale(group)
        return self.contest.over_log(lambda rows: float(scale[rows, look].mean()))

    def told(self, label: str, method: str) -> Estimate:
        """The noise scale of a method over the true one, of all parameters."""
        return self.contest.over(lambda rows: self.bias(label, method, WHOLE, rows))

    def error(self, label: str, method: str, group: str = WHOLE) -> Estimate:
        """Relative, of the noise scale of one draw."""
        return self.contest.over_log(lambda rows: self.spread(label, method, rows, group))

    def steps(self, label: str, target: float, rows: Rows) -> Array:
        """To the loss, at the quickest learning rate of each batch size; inf where they are censored."""
        return np.array([one.steps(rows) for one in self.arrivals[label, target]])

    def least_steps(self, label: str, target: float) -> Estimate | str:
        """At the largest batch size."""
        largest = self.arrivals[label, target][-1]
        return largest.text() if largest.is_censored else self.contest.over_finite(largest.steps)

    def knee(self, label: str, target: float, rows: Rows) -> Knee:
        """No number where steps are censored."""
        return fitted(steps_law, self.settings.batch_sizes, np.log(self.steps(label, target, rows)))

    def predicted(self, label: str, target: float, rows: Rows) -> float:
        """The critical batch size that the noise scale tells, along the followed runs up to the loss."""
        return float(np.exp(self.told_by_run[label, target][rows].mean()))

    def measured_size(self, label: str, target: float) -> Estimate:
        return self.contest.over_finite(lambda rows: self.knee(label, target, rows).size)

    def predicted_size(self, label: str, target: float) -> Estimate:
        return self.contest.over_finite(lambda rows: self.predicted(label, target, rows))

    def ratio(self, label: str, target: float) -> Estimate:
        """Predicted over measured critical batch size."""
        return self.contest.over_finite(lambda r: self.predicted(label, target, r) / self.knee(label, target, r).size)


def told_by_noise(examples: Sequence[int], loss: Array, scale: Array, level: float, batch_size: int) -> float:
    """E_min / S_min up to where the loss comes down to the level, of noise scale N(s) along optimal progress s:

    dS = (1 + N/B) ds,   E_min = int N ds,   S_min = int ds     (McCandlish et al. 2018, appendix D)

    loss and scale are logarithms (T,). Before the first look the noise scale is that of the first. Not a number if the
    loss is not reached.
    """
    end = reached(examples, loss, level)
    if np.isinf(end):
        return float("nan")
    N = np.exp(np.interp(np.linspace(0, end, 501), examples, scale))
    ds = 1 / (1 + N / batch_size)
    return float((N * ds).mean() / ds.mean())


def analyse(settings: NoiseScaleConfig, results: Sequence[Result]) -> Analysis:
    """Raises ValueError unless the results are those of every contestant, batch size and seed."""
    followed = [result for result in results if "followed" in result.coordinates]
    by_label = {
        label: _followed([result for result in followed if result.coordinates["followed"] == label])
        for label in settings.contestants
    }
    trained = contest(settings, runs_of(results))
    pairs = list(product(settings.contestants, settings.targets))
    return Analysis(
        settings,
        trained,
        by_label,
        {
            (label, target): [arrivals(trained.runs[label, B], B, target) for B in settings.batch_sizes]
            for label, target in pairs
        },
        {(label, target): by_label[label].told(target, settings.followed_batch_size) for label, target in pairs},
    )


def _followed(results: Sequence[Result]) -> Followed:
    if not results:
        raise ValueError("runs were not followed")
    first = results[0].found

    def of(*keys: str) -> Array:
        return cube(results, ["seed"], lambda found: reduce(getitem, keys, found)).values

    return Followed(
        tuple(first["examples"]),
        tuple(first["groups"]),
        np.log(of("loss")),
        of("exact"),
        {method: of(method, "mean") for method in METHODS},
        {method: of(method, "spread") for method in METHODS},
    )
