"""Batch-size invariance, computed from the records of a study.

One letter per axis: M method, L learning rate, B batch size, S seed, T checkpoint. Every loss is in nats per example.
A method is tuned at one batch size, on the training loss, and the lr found there is used at all the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.estimate import Array, bounds, resamples
from experiments.grid import Grid, arrange
from experiments.record import Record

# Two methods that coincide at the tuning batch size still differ by rounding in their final loss.
MATCHING_TOLERANCE = 0.01


@dataclass(frozen=True)
class Comparison:
    """What is compared with what: our methods, those that do the same by another road, the reference that is tuned
    everywhere, the batch sizes, and the losses at which scores are matched, in units of the reference's."""

    ours: tuple[str, ...]
    reference: str
    tuning_batch_size: int
    score_batch_sizes: tuple[int, ...]
    kin: tuple[str, ...] = ()
    loss_targets: tuple[float, ...] = (1.0, 2.0)

    def tuning_in(self, grid: Grid) -> int:
        """Index of the batch size of tuning."""
        return grid.batch_sizes.index(self.tuning_batch_size)

    def ours_in(self, grid: Grid) -> list[int]:
        return [grid.methods.index(name) for name in self.ours]

    def reference_in(self, grid: Grid) -> int:
        return grid.methods.index(self.reference)

    def baselines_in(self, grid: Grid) -> list[int]:
        """The reference is one of them."""
        return [i for i, name in enumerate(grid.methods) if name not in (*self.ours, *self.kin)]

    def kin_in(self, grid: Grid) -> list[int]:
        return [grid.methods.index(name) for name in self.kin]


@dataclass(frozen=True)
class Measures:
    """All that is claimed about the methods; the bootstrap gives each number its interval."""

    curve_loss: Array  # (M, L)  final training loss at the tuning batch size
    curve_score: Array  # (M, L)
    score: Array  # (M,)  at the tuned lr, like all that follows
    final_loss: Array  # (M,)
    worst_loss: Array  # (M,)  the largest over B
    test_accuracy: Array  # (M,)
    accuracy_gap: Array  # (M,)  minus the reference's
    targets: Array  # (K,)  the final losses at which methods are matched
    matched_score: Array  # (M, K)
    ratio: Array  # (M, K)  matched score over the best baseline's
    regret: Array  # (M, B)
    mean_regret: Array  # (M,)
    test_regret: Array  # (M, B)
    mean_test_regret: Array  # (M,)
    regret_margin: Array  # (M,)  mean regret minus the best baseline's


# Of Measures: their intervals are formed in logarithms, so as not to reach below 0 when widened for few seeds.
POSITIVE = {"curve_loss", "curve_score", "score", "final_loss", "worst_loss", "targets", "matched_score", "ratio"}


@dataclass(frozen=True)
class Analysis:
    grid: Grid
    comparison: Comparison
    point: Measures
    low: Measures
    high: Measures
    reachable: Array  # (M, K)  share of the bootstrap draws in which a method and a baseline reach the target
    tuned: NDArray[np.int64]  # (M,)  index of the tuned lr
    reference_tuned: NDArray[np.int64]  # (B,)  index of the reference's lr, tuned at each batch size
    seed_floor: Array  # (M,)

    @property
    def baselines(self) -> list[int]:
        return self.comparison.baselines_in(self.grid)

    @property
    def ours(self) -> list[int]:
        return self.comparison.ours_in(self.grid)

    @property
    def kin(self) -> list[int]:
        return self.comparison.kin_in(self.grid)

    @property
    def reference(self) -> int:
        return self.comparison.reference_in(self.grid)

    @property
    def reference_label(self) -> str:
        return self.grid.labels[self.reference]


def spread(loss: Array, axis: int) -> Array:
    """Mean over checkpoints (the last axis) of the standard deviation of ln(loss) along ``axis``.

    The deviation is the unbiased one (n - 1), so that five batch sizes and three seeds can be compared; one value has
    no deviation, and gives nan.
    """
    count = loss.shape[axis]
    if count < 2:
        return np.full(np.delete(loss.shape, [axis % loss.ndim, loss.ndim - 1]), np.nan)
    return np.log(loss).std(axis=axis, ddof=1).mean(axis=-1)


def scores(grid: Grid, batch_sizes: Sequence[int]) -> Array:
    """score = mean_T std_B ln(training loss), on checkpoints after 5% of the budget, mean over seeds: (M, L)."""
    return spread(grid.train_loss[:, :, grid.columns(batch_sizes)][..., grid.late], axis=2).mean(axis=-1)


def seed_floors(grid: Grid, tuned: NDArray[np.int64], batch_sizes: Sequence[int]) -> Array:
    """The score with seeds in place of batch sizes, at each method's tuned lr, mean over batch sizes: (M,)."""
    loss = grid.train_loss[np.arange(len(tuned)), tuned][:, grid.columns(batch_sizes)][..., grid.late]  # (M, B, S, T)
    return spread(loss, axis=2).mean(axis=-1)


def match(loss: Array, score: Array, tuned: int, target: float) -> float:
    """Score at a final loss: linear interpolation in ln(loss) along the lr curve; nan where it is out of reach.

    Only the branch of lr at and below the tuned one is used: above it a method reaches the same loss a second time,
    by being unstable, and nobody would run it there.

    Args:
        loss, score: (L,) along ascending lr
        tuned: index of the lr with the lowest loss
        target: final loss at which to read the score
    """
    x, goal = np.log(loss), np.log(target)
    if x[tuned] - MATCHING_TOLERANCE <= goal <= x[tuned]:
        return float(score[tuned])
    for i in range(tuned, 0, -1):
        if x[i] <= goal <= x[i - 1]:
            return float(np.interp(goal, [x[i], x[i - 1]], [score[i], score[i - 1]]))
    return float("nan")


def out_of_reach(analysis: Analysis, method: int, target: int) -> str:
    """Why a method has no score at a target, in words; empty if it has one."""
    point, tuned = analysis.point, analysis.tuned[method]
    if np.isfinite(point.matched_score[method, target]):
        return ""
    branch, goal = point.curve_loss[method, : tuned + 1], point.targets[target]
    if goal < branch[-1]:
        return f"its lowest loss is {branch[-1]:.3g}, at its tuned lr"
    return f"the loss at its smallest lr is {branch[0]:.3g}, still below the target"


def measure(grid: Grid, comparison: Comparison) -> Measures:
    """Everything in ``Measures``, for the seeds of this grid."""
    every = np.arange(len(grid.methods))
    home = comparison.tuning_in(grid)
    reference, baselines = comparison.reference_in(grid), comparison.baselines_in(grid)

    final_loss = grid.train_loss[..., -1].mean(axis=-1)  # (M, L, B)
    final_test = grid.test_loss[..., -1].mean(axis=-1)  # (M, L, B)
    accuracy = grid.test_accuracy[:, :, home, :, -1].mean(axis=-1)  # (M, L)
    tuned = tune(grid, comparison)
    curve_loss, curve_score = (final_loss[:, :, home], scores(grid, comparison.score_batch_sizes))

    target = curve_loss[reference, tuned[reference]]
    targets = target * np.array(comparison.loss_targets)
    matched = np.array([[match(curve_loss[m], curve_score[m], tuned[m], goal) for goal in targets] for m in every])
    best = [lowest(matched[:, i], baselines) for i in range(len(targets))]
    best_score = np.array([np.nan if m is None else matched[m, i] for i, m in enumerate(best)])

    reference_tuned = tune_everywhere(grid, comparison)
    each = np.arange(len(grid.batch_sizes))
    regret = final_loss[every, tuned] - final_loss[reference, reference_tuned, each]  # (M, B)
    test_regret = final_test[every, tuned] - final_test[reference, reference_tuned, each]  # (M, B)
    mean_regret = regret.mean(axis=-1)
    return Measures(
        curve_loss=curve_loss,
        curve_score=curve_score,
        score=curve_score[every, tuned],
        final_loss=curve_loss[every, tuned],
        worst_loss=final_loss[every, tuned].max(axis=-1),
        test_accuracy=accuracy[every, tuned],
        accuracy_gap=accuracy[every, tuned] - accuracy[reference, tuned[reference]],
        targets=targets,
        matched_score=matched,
        ratio=np.divide(matched, best_score, out=np.full_like(matched, np.nan), where=best_score > 0),
        regret=regret,
        mean_regret=mean_regret,
        test_regret=test_regret,
        mean_test_regret=test_regret.mean(axis=-1),
        regret_margin=mean_regret - mean_regret[baselines].min(),
    )


def tune(grid: Grid, comparison: Comparison) -> NDArray[np.int64]:
    """Index of the lr with the lowest mean final training loss at the tuning batch size: (M,)."""
    return grid.train_loss[:, :, comparison.tuning_in(grid), :, -1].mean(axis=-1).argmin(axis=1)


def tune_everywhere(grid: Grid, comparison: Comparison) -> NDArray[np.int64]:
    """Index of the reference method's best lr at each batch size separately: (B,)."""
    return grid.train_loss[comparison.reference_in(grid), ..., -1].mean(axis=-1).argmin(axis=0)


def lowest(values: Array, among: Sequence[int]) -> int | None:
    """The method, of some of them, with the lowest of the values (M,); None if none of them has a finite one."""
    return min((m for m in among if np.isfinite(values[m])), key=values.__getitem__, default=None)


def best_baseline(analysis: Analysis) -> int:
    """The baseline, if possible not the reference, with the lowest score at the reference's final loss.

    If none reaches that loss, the score is that at the next target, and in the end that at the tuned lr.
    """
    others = [m for m in analysis.baselines if m != analysis.reference]
    for score in (*analysis.point.matched_score.T, analysis.point.score):
        if (best := lowest(score, others)) is not None:
            return best
    return analysis.reference


def analyse(records: Sequence[Record], comparison: Comparison) -> Analysis:
    """Measure, and repeat the whole procedure, tuning included, on resampled seeds: 95% intervals.

    Seeds are drawn jointly for all methods, since runs of one seed share their data order and their initial model. One
    seed has no interval: its ends are not numbers then.
    """
    grid = arrange(records)
    draws = [measure(grid.with_seeds(chosen), comparison) for chosen in resamples(len(grid.seeds))]
    point = measure(grid, comparison)
    low, high = ({}, {})
    for name in (field.name for field in dataclasses.fields(Measures)):
        values = np.stack([getattr(draw, name) for draw in draws])
        low[name], high[name] = _bounds(getattr(point, name), values, len(grid.seeds), name in POSITIVE)
    tuned = tune(grid, comparison)
    return Analysis(
        grid=grid,
        comparison=comparison,
        point=point,
        low=Measures(**low),
        high=Measures(**high),
        reachable=np.mean([np.isfinite(draw.ratio) for draw in draws], axis=0),
        tuned=tuned,
        reference_tuned=tune_everywhere(grid, comparison),
        seed_floor=seed_floors(grid, tuned, comparison.score_batch_sizes),
    )


def _bounds(point: Array, draws: Array, seeds: int, positive: bool) -> tuple[Array, Array]:
    """Over the draws that reach the target; nan where none does, and with one seed. In logarithms for what is positive,
    unless some of it is 0: losses that agree in every digit have a score of 0."""
    never = ~np.isfinite(draws).any(axis=0) | (seeds < 2)
    kept = np.where(never, 1.0, draws)
    if positive and not (kept <= 0).any() and not (point <= 0).any():
        low, high = np.exp(bounds(np.log(point), np.log(kept), max(seeds, 2)))
    else:
        low, high = bounds(point, kept, max(seeds, 2))
    return np.where(never, np.nan, low), np.where(never, np.nan, high)
