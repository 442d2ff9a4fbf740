"""Where invariance ends, with the learning rate tuned at the smallest batch size, and where it is predicted to."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from experiments.contest.analysis import Contest, contest
from experiments.contest.followed import runs_of
from experiments.estimate import Array, Estimate, Rows
from experiments.jobs import Result
from experiments.laboratory.largest_batch.predictors import PREDICTORS, Tuned, predictions
from experiments.laboratory.schemas import LargestBatchConfig
from experiments.schemas.optimizer import BatchInvariantAdamConfig, OptimizerConfig

BROKEN = 1.25  # of the loss at the smallest batch size


@dataclass(frozen=True)
class Analysis(Contest):
    """predicted: ln of the batch size of each predictor, by contestant and predictor (S, looks), and sharpness (S,
    looks) by contestant, at so many examples seen."""

    predicted: dict[tuple[str, str], Array]
    sharpness: dict[str, Array]
    tuned: dict[str, Tuned]
    examples: dict[str, list[int]]

    @property
    def home(self) -> int:
        """The batch size of tuning."""
        return min(self.settings.batch_sizes)

    @property
    def sizes(self) -> list[int]:
        return sorted(self.settings.batch_sizes)

    def looked_at(self) -> list[str]:
        return list(self.tuned)

    def excess(self, label: str, rows: Rows, below: int = 0) -> Array:
        """ln of the loss at each batch size over that at the smallest, all at the learning rate tuned there over all
        seeds, or so many octaves below it."""
        octave = self.runs[label, self.home].octaves[self.best(label, self.home)] - below

        def loss(B: int) -> float:
            runs = self.runs[label, B]
            return float(runs.train[rows, int(np.abs(runs.octaves - octave).argmin())].mean())

        return np.array([loss(B) - loss(self.home) for B in self.sizes])

    def broken(self, label: str, i: int) -> Estimate:
        """The loss at a batch size, by its position, over that at the smallest."""
        return self.over_log(lambda rows: float(self.excess(label, rows)[i]))

    def log_breakdown(self, label: str, rows: Rows, below: int = 0) -> float:
        return log_crossing(self.sizes, self.excess(label, rows, below))

    def breakdown(self, label: str, below: int = 0) -> Estimate:
        return self.over_log(lambda rows: self.log_breakdown(label, rows, below))

    def beyond(self, label: str, below: int = 0) -> bool:
        """Whether invariance ends beyond all batch sizes, if anywhere."""
        return bool(self.excess(label, self.everyone, below).max() <= log(BROKEN))

    def earlier(self, label: str, other: str, below: int = 0) -> Estimate:
        """Where the one ends, over where the other does, whose learning rate is so many octaves below the tuned one."""
        return self.over_log(lambda rows: self.log_breakdown(label, rows) - self.log_breakdown(other, rows, below))

    def log_predicted(self, label: str, predictor: str, rows: Rows) -> float:
        """At the look where it is smallest: a run is as invariant as the part of it that is least."""
        return float(self.predicted[label, predictor][rows].mean(axis=0).min())

    def prediction(self, label: str, predictor: str) -> Estimate:
        return self.over_log(lambda rows: self.log_predicted(label, predictor, rows))

    def ratio_to_measured(self, label: str, predictor: str) -> Estimate:
        """Predicted over measured."""
        return self.over_log(lambda rows: self.log_predicted(label, predictor, rows) - self.log_breakdown(label, rows))


def log_crossing(sizes: Sequence[int], excess: Array) -> float:
    """ln of the smallest batch size at which the loss is BROKEN times that at the first, between two of them where
    ln(loss) along ln(B) says; the largest where it never is."""
    for i in range(1, len(sizes)):
        if excess[i] > log(BROKEN):
            before, after = excess[i - 1], excess[i]
            share = (log(BROKEN) - before) / (after - before)
            return log(sizes[i - 1]) + float(share) * log(sizes[i] / sizes[i - 1])
    return log(sizes[-1])


def analyse(
    settings: LargestBatchConfig, results: Sequence[Result], optimizers: Mapping[str, OptimizerConfig]
) -> Analysis:
    """Raises ValueError unless the runs of every contestant and batch size are a grid."""
    found = contest(settings, runs_of(results))
    looks = [r for r in results if "looks" in r.coordinates]
    predicted, sharpness, tuned, examples = {}, {}, {}, {}
    for label, overrides in settings.contestants.items():
        of = {r.coordinates["seed"]: r.found for r in looks if r.coordinates["overrides"] == shlex.join(overrides)}
        if not of:
            continue
        rows = [of[seed] for seed in settings.seeds]
        optimizer = optimizers[label]
        assert isinstance(optimizer, BatchInvariantAdamConfig)
        home = min(settings.batch_sizes)
        lr = float(found.runs[label, home].lr[found.best(label, home)])
        tuned[label] = Tuned.of(dataclasses.replace(optimizer, lr=lr))
        of_looks = [[predictions(tuned[label], one) for one in row] for row in rows]
        for name in PREDICTORS:
            predicted[label, name] = np.log([[one[name] for one in row] for row in of_looks])
        sharpness[label] = np.array([[one["sharpness"] for one in row] for row in rows])
        examples[label] = [one["examples"] for one in rows[0]]
    return Analysis(settings, found.runs, predicted, sharpness, tuned, examples)
