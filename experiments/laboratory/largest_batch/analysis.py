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
from experiments.schemas.optimizer import BatchInvariantAdamConfig, OptimizerConfig, SaturatingAdamConfig

SMALL = 64  # batch sizes up to this one are small
START = 0.05  # of the examples, after which curves are compared


@dataclass(frozen=True)
class Analysis(Contest):
    """predicted: ln of the batch size of each predictor, by contestant and predictor (S, looks), and sharpness (S,
    looks) by contestant, at so many examples seen; saturating: what a contestant's step saturates at, in words."""

    settings: LargestBatchConfig
    predicted: dict[tuple[str, str], Array]
    sharpness: dict[str, Array]
    tuned: dict[str, Tuned]
    examples: dict[str, list[int]]
    saturating: dict[str, str]

    @property
    def home(self) -> int:
        """The batch size of tuning."""
        return min(self.settings.batch_sizes)

    @property
    def sizes(self) -> list[int]:
        return sorted(self.settings.batch_sizes)

    @property
    def plain(self) -> list[str]:
        """Contestants whose step is B lr0, whose runs are looked at."""
        return [label for label in self.labels if label not in self.saturating]

    def octave(self, label: str) -> float:
        """Of the learning rate tuned at the smallest batch size over all seeds."""
        return float(self.runs[label, self.home].octaves[self.best(label, self.home)])

    def lr(self, label: str, below: float = 0) -> float:
        """That learning rate, or so many octaves below it."""
        return float(self.runs[label, self.home].lr[self.best(label, self.home)]) / 2**below

    def log_tuned_once(self, label: str, B: int, rows: Rows, below: float = 0) -> float:
        """ln of the loss at a batch size with that learning rate, or so many octaves below it."""
        runs = self.runs[label, B]
        return float(runs.train[rows, nearest(runs.octaves, self.octave(label) - below)].mean())

    def tuned_once(self, label: str, B: int) -> Estimate:
        return self.over_log(lambda rows: self.log_tuned_once(label, B, rows))

    def ratio_tuned_once(self, label: str, other: str, B: int) -> Estimate:
        return self.over_log(lambda rows: self.log_tuned_once(label, B, rows) - self.log_tuned_once(other, B, rows))

    def excess(self, label: str, rows: Rows, below: float = 0) -> Array:
        """ln of the loss at each batch size over that at the smallest, all at the same learning rate."""
        losses = np.array([self.log_tuned_once(label, B, rows, below) for B in self.sizes])
        return losses - losses[0]

    def broken(self, label: str, i: int) -> Estimate:
        """The loss at a batch size, by its position, over that at the smallest."""
        return self.over_log(lambda rows: float(self.excess(label, rows)[i]))

    def log_breakdown(self, label: str, rows: Rows, below: float = 0) -> float:
        return log_crossing(self.sizes, self.excess(label, rows, below), log(self.settings.broken))

    def breakdown(self, label: str, below: float = 0) -> Estimate:
        return self.over_log(lambda rows: self.log_breakdown(label, rows, below))

    def beyond(self, label: str, below: float = 0) -> bool:
        """Whether invariance ends beyond all batch sizes, if anywhere."""
        return bool(self.excess(label, self.everyone, below).max() <= log(self.settings.broken))

    def earlier(self, label: str, other: str) -> Estimate:
        """Where the one ends, over where the other does."""
        return self.over_log(lambda rows: self.log_breakdown(label, rows) - self.log_breakdown(other, rows))

    def ends_within(self, label: str) -> list[float]:
        """Octaves below the tuned one, falling to 0, at which all batch sizes were run and invariance ends among them.
        Above it the smallest batch size is unstable too."""
        run = set.intersection(*(set(self.runs[label, B].octaves.tolist()) for B in self.sizes))
        belows = sorted((self.octave(label) - octave for octave in run), reverse=True)
        return [below for below in belows if below >= 0 and not self.beyond(label, below)]

    def log_slope(self, label: str, rows: Rows) -> float:
        """Of ln B, where invariance ends, along ln(lr), by least squares; not a number without two learning rates."""
        belows = self.ends_within(label)
        if len(belows) < 2:
            return np.nan
        ends = [self.log_breakdown(label, rows, below) for below in belows]
        return float(np.polyfit(-log(2) * np.array(belows), ends, 1)[0])

    def slope(self, labels: Sequence[str]) -> Estimate:
        """Their mean."""
        return self.over(lambda rows: float(np.mean([self.log_slope(label, rows) for label in labels])))

    def log_best(self, label: str, rows: Rows) -> float:
        """ln of the loss at its best batch size, each with its own tuned learning rate."""
        return min(self.log_loss(label, B, rows) for B in self.sizes)

    def best_loss(self, label: str) -> Estimate:
        return self.over_log(lambda rows: self.log_best(label, rows))

    def best_size(self, label: str) -> int:
        return min(self.sizes, key=lambda B: self.log_loss(label, B, self.everyone))

    def best_ratio(self, label: str, other: str) -> Estimate:
        return self.over_log(lambda rows: self.log_best(label, rows) - self.log_best(other, rows))

    def small(self) -> list[int]:
        return [B for B in self.sizes if B <= SMALL]

    def log_score(self, label: str, rows: Rows) -> float:
        """ln of the standard deviation of ln(loss) over small batch sizes, at the learning rate tuned at the smallest:
        a mean over the curve and over seeds. Not a number without two such sizes."""
        if len(self.small()) < 2:
            return np.nan
        runs = [self.runs[label, B] for B in self.small()]
        late = np.array(runs[0].examples) > START * runs[0].examples[-1]
        curves = [one.curve[rows, nearest(one.octaves, self.octave(label))][:, late] for one in runs]  # (S, T) each
        return float(np.log(np.std(curves, axis=0, ddof=1).mean()))

    def score(self, label: str) -> Estimate:
        return self.over_log(lambda rows: self.log_score(label, rows))

    def score_ratio(self, label: str, other: str) -> Estimate:
        return self.over_log(lambda rows: self.log_score(label, rows) - self.log_score(other, rows))

    def log_predicted(self, label: str, predictor: str, rows: Rows) -> float:
        """At the look where it is smallest: a run is as invariant as the part of it that is least."""
        return float(self.predicted[label, predictor][rows].mean(axis=0).min())

    def prediction(self, label: str, predictor: str) -> Estimate:
        return self.over_log(lambda rows: self.log_predicted(label, predictor, rows))

    def ratio_to_measured(self, label: str, predictor: str) -> Estimate:
        """Predicted over measured."""
        return self.over_log(lambda rows: self.log_predicted(label, predictor, rows) - self.log_breakdown(label, rows))


def nearest(octaves: Array, octave: float) -> int:
    """Its position. One that was not run is at least as bad as the end that is closer to the best."""
    return int(np.abs(octaves - octave).argmin())


def log_crossing(sizes: Sequence[int], excess: Array, limit: float) -> float:
    """ln of the smallest batch size at which the excess is at the limit, between two of them where a line along ln(B)
    says; the largest where it never is."""
    for i in range(1, len(sizes)):
        if excess[i] > limit:
            share = (limit - excess[i - 1]) / (excess[i] - excess[i - 1])
            return log(sizes[i - 1]) + float(share) * log(sizes[i] / sizes[i - 1])
    return log(sizes[-1])


def saturates_at(optimizer: SaturatingAdamConfig) -> str:
    extent = "the model" if optimizer.over == "model" else f"each {optimizer.over}"
    times = "" if optimizer.saturation == 1 else f"{optimizer.saturation:g} times "
    return f"{times}the noise scale of {extent}"


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
    saturating = {label: saturates_at(o) for label, o in optimizers.items() if isinstance(o, SaturatingAdamConfig)}
    return Analysis(settings, found.runs, predicted, sharpness, tuned, examples, saturating)
