"""The tables of running_averages."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.estimate import over_seeds
from experiments.laboratory.running_averages.analysis import LABELS, Analysis, of
from experiments.laboratory.running_averages.smoothing import AVERAGES, window


def tables(analysis: Analysis) -> list[Table]:
    return [_at_one_horizon(analysis), _along_horizons(analysis)]


def _at_one_horizon(analysis: Analysis) -> Table:
    settings, tracking, noise = analysis.settings, analysis.tracking, analysis.noise
    at = settings.horizons.index(settings.shown)
    rows: list[list[Cell]] = []
    for i, kind in enumerate(AVERAGES):
        numbers = [
            analysis.level[:, at, i],
            of(noise, kind, "cosine", "warm-up")[:, at],
            of(tracking, kind, "cosine", "warm-up")[:, at],
            of(noise, kind, "cosine", "settled")[:, at],
            of(tracking, kind, "cosine", "settled")[:, at],
        ]
        rows.append([LABELS[kind], *map(over_seeds, numbers)])
    return Table(
        f"Averages of horizon N = {settings.shown}",
        "Level: on the offset, mean over the first quarter of a horizon, 1 is right. Noise: the share of the data's "
        "variance that is left. Lag: squared tracking error on the cosine. Warm-up: the first N examples; settled: the "
        f"second half of {settings.examples:,}. Brackets: 95% bootstrap intervals over {len(settings.seeds)} seeds of "
        f"{settings.draws} draws each.",
        ["average", "level early", "noise warm-up", "lag warm-up", "noise settled", "lag settled"],
        rows,
        tuple(AVERAGES.index(kind) for kind in ("debiased_ewma", "slides")),
    )


def _along_horizons(analysis: Analysis) -> Table:
    settings, tracking, noise = analysis.settings, analysis.tracking, analysis.noise
    rows: list[list[Cell]] = []
    for at, horizon in enumerate(settings.horizons):
        numbers = [
            of(noise, "debiased_ewma", "cosine", "settled")[:, at],
            of(noise, "window", "cosine", "settled")[:, at],
            of(tracking, "debiased_ewma", "cosine", "settled")[:, at],
            of(tracking, "window", "cosine", "settled")[:, at],
        ]
        rows.append([str(horizon), f"{1 / window(horizon):.3g}", *map(over_seeds, numbers)])
    return Table(
        "Settled, along horizons",
        f"At equal noise: a window of 2N - 1 examples beside an exponential average of horizon N, on a cosine of "
        f"period {settings.period:,}. The last two columns are squared tracking errors.",
        ["N", "(1-beta)/(1+beta)", "noise, EWMA", "noise, window", "lag, EWMA", "lag, window"],
        rows,
        (),
    )


TERMS = {
    "Horizon N": "beta = 1 - 1/N: an example's weight in the average is a third after about N more.",
    "Noise and lag": "The mean square error over draws is the sum of both: the variance of the average, and the square "
    "of its mean minus the signal.",
    "min(t, N) mean": "moves by 1/min(t, N) of the difference to each example, as on the slides: the plain mean of the "
    "first N examples, and then an exponential average. It is not the mean of the last N.",
    "EWMA from zero": "torch's momentum, RMSprop and Adam before its bias correction.",
}
