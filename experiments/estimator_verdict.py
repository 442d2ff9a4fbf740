"""What the measurements of experiments.estimators come to: the verdict, and the tables.

The winner has the fewest diverged runs, and among those the lowest mean over tasks, R, B and seeds of ln(final loss).
Where the interval of a difference to it includes zero, that estimator ties with it, and the number of cells (task, R,
B) decides in which it is behind the best estimator there by more than seeds explain. Only finite R count: the default
of R is one, and R = inf is shown. The error of ln s (mean over R and B of the root mean square, of a trained model)
decides nothing: at fixed parameters no estimator lags behind a gradient that turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, over_seeds
from experiments.estimation_error import Error, coincide
from gradstats.optim.moment import ESTIMATORS


def name_of(r: float, estimator: str) -> str:
    return f"R = {r:g}, {estimator}"


@dataclass(frozen=True)
class Training:
    """One axis a letter: M method (R, estimator), B batch size, S seed."""

    task: str
    methods: tuple[tuple[float, str], ...]
    batch_sizes: tuple[int, ...]
    tuned_at: int
    lr: Array  # (M,)
    loss: Array  # (M, B, S)  final training loss
    diverged: NDArray[np.bool_]  # (M, B, S)
    score: Array  # (M, S)


@dataclass(frozen=True)
class Verdict:
    """Of one estimator, over all cells (R, B) where it matters which it is."""

    estimator: str
    diverged: int
    ln_loss: float
    behind: Estimate  # of the ln(loss) to the lowest one's
    lost: int  # cells in which it is behind the best estimator there, by more than seeds explain
    error: float
    score: float  # mean over tasks and R, at the tuned learning rates


def judge(trainings: Sequence[Training], found: Sequence[Error]) -> list[Verdict]:
    """The winner first."""
    of_tasks = {e: [cells(t, e, np.log(t.loss)).mean(axis=0) for t in trainings] for e in ESTIMATORS}  # (S,) each
    loss = {e: np.mean(values, axis=0) for e, values in of_tasks.items()}
    broken = {e: sum(int(cells(t, e, t.diverged).sum()) for t in trainings) for e in ESTIMATORS}
    error = {e: trained_error(found, e) for e in ESTIMATORS}
    of_cells = np.array([np.concatenate([cells(t, e, np.log(t.loss)) for t in trainings]) for e in ESTIMATORS])
    best = of_cells[of_cells.mean(axis=2).argmin(axis=0), np.arange(of_cells.shape[1])]  # (cells, S)
    score = {e: float(np.mean([mean_score(t, e) for t in trainings])) for e in ESTIMATORS}
    leader = min(ESTIMATORS, key=lambda e: (broken[e], loss[e].mean()))
    verdicts = []
    for e, own in zip(ESTIMATORS, of_cells, strict=True):
        behind = over_seeds(loss[e] - loss[leader])
        lost = sum(over_seeds(cell).low > 0 for cell in own - best)
        verdicts.append(Verdict(e, broken[e], float(loss[e].mean()), behind, lost, error[e], score[e]))
    fewest = broken[leader]

    def rank(v: Verdict) -> tuple[bool, bool, int, float]:
        ties = not v.behind.low > 0
        return v.diverged > fewest, not ties, v.lost if ties else 0, v.ln_loss

    return sorted(verdicts, key=rank)


def cells(training: Training, estimator: str, values: NDArray[Any]) -> NDArray[Any]:
    """Those of one estimator where R > B or B = 1, (cells, S), of finite R."""
    chosen = [
        values[m, b]
        for m, (r, e) in enumerate(training.methods)
        for b, size in enumerate(training.batch_sizes)
        if e == estimator and math.isfinite(r) and not coincide(r, size)
    ]
    return np.stack(chosen)


def mean_score(training: Training, estimator: str) -> float:
    return float(np.mean([training.score[m] for m, (_, e) in enumerate(training.methods) if e == estimator]))


def trained_error(found: Sequence[Error], estimator: str) -> float:
    """Mean over R and B of the root mean square error at trained parameters, after the most examples."""
    return float(np.mean([e.rms for e in at_the_end(found, "trained") if e.estimator == estimator]))


def at_the_end(found: Sequence[Error], name: str) -> list[Error]:
    """Those of one population after the most examples."""
    last = max(e.examples for e in found)
    return [e for e in found if (e.population, e.examples) == (name, last)]


def tables(trainings: Sequence[Training], found: Sequence[Error], verdicts: Sequence[Verdict]) -> list[Table]:
    return [_verdict(verdicts), *map(_training, trainings), *(_errors(found, n) for n in ("trained", "initial"))]


def _verdict(verdicts: Sequence[Verdict]) -> Table:
    return Table(
        f"The estimator for R > B: {verdicts[0].estimator}",
        "Over all tasks, finite R and B where the estimators differ. Fewest diverged runs, then lowest ln(final "
        "training loss); where the interval (95%, over seeds) of the difference includes zero, the fewest cells lost, "
        "in which it is behind the best estimator by more than seeds explain. Score: over B, mean over tasks and R.",
        ["estimator", "diverged", "ln loss", "to the lowest", "cells lost", "error of ln s", "score"],
        [
            [
                v.estimator,
                str(v.diverged),
                f"{v.ln_loss:.3f}",
                v.behind,
                str(v.lost),
                f"{v.error:.2f}",
                f"{v.score:.3f}",
            ]
            for v in verdicts
        ],
        emphasised=(0,),
    )


def _training(training: Training) -> Table:
    rows: list[list[Cell]] = []
    for m, (r, estimator) in enumerate(training.methods):
        losses = [
            f"{mean_and_error(training.loss[m, b], 4)}{' diverged' * bool(training.diverged[m, b].any())}"
            for b in range(len(training.batch_sizes))
        ]
        score = mean_and_error(training.score[m], 3)
        rows.append([name_of(r, estimator), f"{training.lr[m]:.3g}", *losses, score])
    return Table(
        f"Final training loss, {training.task}",
        f"At each method's lr, tuned at B = {training.tuned_at}; the score is over all B. Means over seeds and their "
        f"standard errors. Where R is at most B and B > 1 the estimators are one run.",
        ["method", "lr", *(f"B = {b}" for b in training.batch_sizes), "score"],
        rows,
        emphasised=(),
    )


def _errors(found: Sequence[Error], name: str) -> Table:
    chosen = at_the_end(found, name)
    sizes = sorted({e.batch_size for e in chosen})
    texts: dict[str, dict[int, str]] = {}
    for e in sorted(chosen, key=lambda e: e.reference_batch_size):
        texts.setdefault(name_of(e.reference_batch_size, e.estimator), {})[e.batch_size] = error_text(e)
    rows: list[list[Cell]] = [[method, *(row.get(b, "") for b in sizes)] for method, row in texts.items()]
    return Table(
        f"Error of ln s on the digits, {name} parameters",
        f"After {chosen[0].examples:,} examples: bias, root mean square, share of elements at the floor; "
        f"means over seeds.",
        ["method", *(f"B = {b}" for b in sizes)],
        rows,
        emphasised=(),
    )


def error_text(e: Error) -> str:
    bias, rms, floored = (float(np.mean(v)) for v in (e.bias, e.rms, e.floored))
    return f"{bias:+.2f} {rms:.2f} {floored:.0%}"


def mean_and_error(values: Array, digits: int) -> str:
    """Over seeds; one seed has no error."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"
