"""What depends on the number of examples seen: the learning rate, and when a run is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, pi, sin

import numpy as np

from experiments.config import Decay
from experiments.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Multiplier f of the learning rate at e examples, with W = warmup, T = total and H = T - W:

        f(e) = e / W                        e < W
               1                            none        then
               1 - (e - W) / H              linear
               (1 + cos(pi (e - W) / H))/2  cosine

    A step that covers the examples from e to e + B is multiplied by the mean of f over them,
    (F(e + B) - F(e)) / B with F the integral of f: so the sum of B f over a run does not depend on B.
    """

    warmup: int
    total: int
    decay: Decay

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total:
            raise UserError(
                f"train.warmup_examples={self.warmup} must be at least 0 and less than the run's {self.total} examples"
            )

    def mean(self, start: int, stop: int) -> float:
        """Mean multiplier over the examples start to stop, start < stop."""
        return (self.integral(stop) - self.integral(start)) / (stop - start)

    def integral(self, examples: int) -> float:
        """Integral of the multiplier over the first examples."""
        if examples < self.warmup:
            return examples**2 / (2 * self.warmup)
        return self.warmup / 2 + DECAY_INTEGRALS[self.decay](examples - self.warmup, self.total - self.warmup)


# Of the u examples since the warm-up, of h in all.
DECAY_INTEGRALS: dict[Decay, Callable[[int, int], float]] = {
    Decay.none: lambda u, h: u,
    Decay.linear: lambda u, h: u - u**2 / (2 * h),
    Decay.cosine: lambda u, h: u / 2 + h / (2 * pi) * sin(pi * u / h),
}


def budget(epochs: float, examples: int, multiple: int, batch_size: int) -> int:
    """Examples to train on: the largest multiple within so many epochs.

    Raises UserError if a batch size does not divide the multiple, since runs of other batch sizes could not be
    evaluated at the same counts, and if the epochs are too few for one multiple.
    """
    if multiple % batch_size:
        raise UserError(
            f"train.batch_size={batch_size} does not divide evaluation.multiple={multiple}, "
            f"so evaluations would fall within a batch: set evaluation.multiple to a multiple of {batch_size}"
        )
    total = floor(epochs * examples / multiple) * multiple
    if total == 0:
        raise UserError(
            f"train.epochs={epochs} of {examples} examples is less than evaluation.multiple={multiple}: "
            "train for longer, or lower the multiple"
        )
    return total


def evaluation_counts(total: int, multiple: int, count: int) -> list[int]:
    """0, and at most count log-spaced multiples up to and with the total."""
    spaced = np.geomspace(multiple, total, count) / multiple
    return [0, *sorted({round(value) * multiple for value in spaced} | {total})]


def every(interval: int, batch_size: int, total: int) -> set[int]:
    """Multiples of the interval, rounded up to whole batches, with the total."""
    step = -(-interval // batch_size) * batch_size
    return {*range(step, total, step), total}
