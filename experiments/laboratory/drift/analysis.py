"""Drift of the gradient, noise of its averages and where they are equal, along runs with tuned learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from experiments.cube import Cube, cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.drift.follow import lengths_of, scatter_of
from experiments.laboratory.schemas import DriftConfig
from experiments.parabola import lowest_point

KINDS = ("drift", "error", "lag", "scatter")


@dataclass(frozen=True)
class Analysis:
    """loss: final training loss (S, horizon, lr). Of runs at the tuned learning rates, `levels` (S, horizon, group,
    phase, 2), signal and noise, and `curves` (S, horizon, group, phase, KINDS, length), not a number where a run is
    shorter; lengths and bounds of phases in examples."""

    settings: DriftConfig
    batch_size: int
    loss: Cube
    levels: Array
    curves: Array
    groups: list[str]
    lengths: list[int]
    bounds: list[tuple[int, int]]

    @property
    def tuned(self) -> list[int]:
        """Of each horizon, the position of its best learning rate."""
        return tuned(self.loss.values)

    @property
    def best(self) -> int:
        """The position of the horizon with the lowest loss, at its tuned learning rate."""
        return int(tuned_loss(self.loss.values).argmin())

    def noise_of_batch(self, group: str, phase: int) -> Array:
        """tr Sigma / B along the run of the best horizon, (S,)."""
        noise: Array = self.levels[:, self.best, self.groups.index(group), phase, 1] / self.batch_size
        return noise

    def signal(self, group: str, phase: int) -> Array:
        """||g||^2 along the run of the best horizon, (S,)."""
        found: Array = self.levels[:, self.best, self.groups.index(group), phase, 0]
        return found

    def curve(self, kind: str, group: str, phase: int, horizon: int | None = None) -> Array:
        """(S, length), along the run of a horizon, the best by default."""
        run = self.best if horizon is None else horizon
        found: Array = self.curves[:, run, self.groups.index(group), phase, KINDS.index(kind)]
        return found

    def expected_scatter(self, group: str, phase: int, horizon: int | None = None) -> Array:
        """Of averages of independent batches, (S, length)."""
        run = self.best if horizon is None else horizon
        noise = self.levels[:, run, self.groups.index(group), phase, 1]
        return noise[:, None] * np.array([scatter_of(n, 1.0, self.batch_size) for n in self.lengths])

    def drift(self, group: str, phase: int, horizon: int | None = None) -> Array:
        """(S, length)."""
        return self.curve("drift", group, phase, horizon)

    def crossing(self, group: str, phase: int, horizon: int | None = None) -> Estimate:
        """Where drift over N examples is the noise of the average of horizon N."""
        both = [self.drift(group, phase, horizon), self.expected_scatter(group, phase, horizon)]
        return over_seeds(np.stack(both, axis=1), lambda rows: crossing(self.lengths, *rows.mean(axis=0)))

    def tracking(self, group: str, phase: int, horizon: int | None = None) -> Estimate:
        """The horizon with the least error."""
        error = self.curve("error", group, phase, horizon)
        return over_seeds(error, lambda rows: lowest(self.lengths, rows.mean(axis=0)))


def tuned(loss: Array) -> list[int]:
    best: list[int] = np.log(loss).mean(axis=0).argmin(axis=1).tolist()
    return best


def tuned_loss(loss: Array) -> Array:
    """Geometric mean over seeds at the best learning rate, (horizon,)."""
    found: Array = np.exp(np.log(loss).mean(axis=0).min(axis=1))
    return found


def crossing(lengths: list[int], rising: Array, falling: Array) -> float:
    """Where the curves meet, interpolated in logarithms; if they do not, the end at which they are closest."""
    gap = (np.log(rising) - np.log(falling))[np.isfinite(rising)]
    if gap[0] > 0:
        return float(lengths[0])
    for i in range(len(gap) - 1):
        if gap[i] <= 0 < gap[i + 1]:
            return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** (gap[i] / (gap[i] - gap[i + 1])))
    return float(lengths[-1])


def lowest(lengths: list[int], values: Array) -> float:
    """Where a curve over evenly spaced octaves is lowest; at an end of them, the end."""
    return 2.0 ** lowest_point(np.log2(lengths), values)


def each(found: dict[str, Any], value: Callable[[dict[str, Any]], Any]) -> list[list[Any]]:
    """Of every phase of every group."""
    return [[value(phase) for phase in phases] for phases in found["groups"].values()]


def losses(results: Sequence[Result]) -> Cube:
    """Final training losses (S, horizon, lr); a run that diverged has its first."""
    trained = [result for result in results if "multiplier" in result.coordinates]
    return cube(trained, ["seed", "horizon", "multiplier"], attrgetter("final_train_loss"))


def analyse(settings: DriftConfig, results: Sequence[Result]) -> Analysis:
    followed = [result for result in results if "phases" in result.coordinates]
    groups = followed[0].found["groups"]
    first = next(iter(groups.values()))
    B = followed[0].coordinates["batch_size"]
    assert isinstance(B, int)
    return Analysis(
        settings,
        batch_size=B,
        loss=losses(results),
        levels=cube(followed, ["seed", "horizon"], lambda f: each(f, lambda p: [p["signal"], p["noise"]])).values,
        curves=cube(followed, ["seed", "horizon"], lambda f: each(f, lambda p: [p[kind] for kind in KINDS])).values,
        groups=list(groups),
        lengths=lengths_of(B, settings.lengths),
        bounds=[(a, b) for a, b in (phase["examples"] for phase in first)],
    )
