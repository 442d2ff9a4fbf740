"""What the races say: when each method reaches the target, and what a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.adam_and_friends.race import METHODS, SIDES
from experiments.laboratory.schemas import AdamAndFriendsConfig

SHOWN = ("torch", "ours")


@dataclass(frozen=True)
class Analysis:
    """Axes: seeds, methods, sides; of loss and seconds also looks. reached, its seconds: nan where a run did not.
    exact: the loss in float64 at a smaller lr, of torch's and ours."""

    settings: AdamAndFriendsConfig
    rates: dict[str, float]
    tuning: Array  # (methods, multipliers), steps to the target
    steps: Array  # (looks,)
    loss: Array
    exact: Array
    seconds: Array
    reached: Array
    seconds_reached: Array
    step: Array  # seconds

    def of(self, values: Array, method: str, side: str = "torch") -> Array:
        return values[:, list(METHODS).index(method), SIDES.index(side)]


def look_at(target: float, found: dict[str, list[float | None]]) -> int | None:
    """The first look at which the loss is not above the target; None if there is none."""
    return next((i for i, loss in enumerate(found["loss"]) if loss is not None and loss <= target), None)


def tuning_steps(settings: AdamAndFriendsConfig, results: Sequence[Result]) -> Array:
    """Steps to the target (methods, multipliers), mean over the tuning seeds; a run that misses it counts twice its
    budget."""

    def count(found: dict[str, list[float | None]]) -> float:
        look = look_at(settings.target, found)
        return 2 * settings.steps if look is None else look * settings.every

    tuning = [result for result in results if result.coordinates["seed"] in settings.tuning_seeds]
    steps = np.empty((len(METHODS), len(settings.lr_multipliers)))
    for i, method in enumerate(METHODS):
        for j, multiplier in enumerate(settings.lr_multipliers):
            lr = METHODS[method].lr * multiplier
            found = cube(tuning, ("seed",), count, method=method, side="torch", lr=lr, double=False)
            steps[i, j] = found.values.mean()
    return steps


def tuned(settings: AdamAndFriendsConfig, results: Sequence[Result]) -> dict[str, float]:
    best = tuning_steps(settings, results).argmin(axis=1)
    return {
        name: method.lr * settings.lr_multipliers[int(i)]
        for (name, method), i in zip(METHODS.items(), best, strict=True)
    }


def analyse(settings: AdamAndFriendsConfig, results: Sequence[Result]) -> Analysis:
    raced = [result for result in results if result.coordinates["seed"] in settings.seeds]
    axes = ("seed", "method", "side")

    def axis(name: str) -> Array:
        return cube(raced, axes, lambda found: found[name], double=False).values

    def at_target(name: str) -> Array:
        def value(found: dict[str, list[float | None]]) -> float:
            look = look_at(settings.target, found)
            return np.nan if look is None else float(found[name][look] or 0.0)

        return cube(raced, axes, value, double=False).values

    return Analysis(
        settings=settings,
        rates=tuned(settings, results),
        tuning=tuning_steps(settings, results),
        steps=axis("steps")[0, 0, 0],
        loss=axis("loss"),
        exact=cube(raced, axes, lambda found: found["loss"], double=True).values,
        seconds=axis("seconds"),
        reached=at_target("steps"),
        seconds_reached=at_target("seconds"),
        step=axis("step"),
    )


def median(values: Array) -> Estimate:
    """Not a number if one of the seeds has none."""
    if not np.isfinite(values).all():
        return Estimate(np.nan, np.nan, np.nan)
    return over_seeds(values, lambda rows: float(np.median(rows)))


def ratio(first: Array, second: Array) -> Estimate:
    """Of medians over seeds, which both share."""
    return over_seeds(
        np.stack([first, second], axis=1), lambda rows: float(np.median(rows[:, 0]) / np.median(rows[:, 1]))
    )
