"""When runs come to a loss; those that never do are censored: it takes more than they had.

A count is that of a learning rate, the geometric mean of its runs', and it has none unless every run comes there. So no
run that diverged, or that ended above the loss, is a number in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.contest.analysis import Runs
from experiments.estimate import Array, Rows
from experiments.record import Record


@dataclass(frozen=True)
class Arrivals:
    """Of one contestant at one batch size: ln of the examples until each run is at the loss (S, L), inf of those that
    never are; a run's examples; and steps, of the batch size."""

    logs: Array
    budget: int
    batch_size: int

    def steps(self, rows: Rows) -> float:
        """At the quickest learning rate; inf if it is none."""
        return float(np.exp(self._by_rate(rows).min())) / self.batch_size

    @property
    def bound(self) -> float:
        """Steps that are inf are more than that."""
        return self.budget / self.batch_size

    def text(self) -> str:
        """The steps of all seeds."""
        return f"more than {self.bound:.3g}" if self.is_censored else f"{self.steps(self._everyone):.3g}"

    @property
    def is_censored(self) -> bool:
        """For all seeds; if they are not, no resample of them is."""
        return bool(np.isinf(self._by_rate(self._everyone)).all())

    @property
    def at_edge(self) -> bool:
        """Whether the quickest learning rate is an end of the grid."""
        logs = self._by_rate(self._everyone)
        return not self.is_censored and int(logs.argmin()) in (0, len(logs) - 1)

    @property
    def _everyone(self) -> Rows:
        return np.arange(len(self.logs))

    def _by_rate(self, rows: Rows) -> Array:
        found: Array = self.logs[rows].mean(axis=0)
        return found


def arrivals(runs: Runs, batch_size: int, target: float) -> Arrivals:
    """A run that diverged has its first loss everywhere, and so does not arrive."""
    level = float(np.log(target))
    examples = [[reached(runs.examples, curve, level) for curve in of_seed] for of_seed in runs.curve]
    return Arrivals(np.log(examples), runs.examples[-1], batch_size)


def arrival(record: Record, target: float) -> float:
    """Of one run, in examples; inf if it diverged, whatever its loss had been."""
    if record.status == "diverged":
        return float("inf")
    return reached(record.examples, np.log(record.train_loss), float(np.log(target)))


def reached(examples: Sequence[int], curve: Array, level: float) -> float:
    """Where a curve first comes down to the level, between its points by a line; inf if it never does."""
    below = np.flatnonzero(curve <= level)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(examples[0])
    share = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
    return float(examples[i - 1] + share * (examples[i] - examples[i - 1]))
