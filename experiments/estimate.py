"""Numbers with their uncertainty, and the sentences that state them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
Rows = NDArray[np.int64]  # seeds, drawn with repetition

Verdict = Literal["holds", "does not hold", "cannot be judged"]

DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float
    percent: bool = False

    def __str__(self) -> str:
        return self.text() + (f" [{self.interval()}]" if np.isfinite([self.value, self.low, self.high]).all() else "")

    def text(self) -> str:
        return _number(self.value, self.percent)

    def interval(self) -> str:
        return f"{_number(self.low, self.percent)}, {_number(self.high, self.percent)}"

    def exp(self) -> Estimate:
        """Of what this is the natural logarithm of: its interval is above 0."""
        return Estimate(float(np.exp(self.value)), float(np.exp(self.low)), float(np.exp(self.high)))

    def verdict(self, bar: float) -> Verdict:
        """Whether the number lies below the bar: judged only where the whole interval is on one side."""
        if not np.isfinite([self.value, self.low, self.high]).all() or self.low <= bar < self.high:
            return "cannot be judged"
        return "holds" if self.value <= bar else "does not hold"


def _number(value: float, percent: bool) -> str:
    if not np.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.1f}"
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.0e}"


def listed(values: Sequence[float]) -> str:
    """As in "{4, 16, 64}"."""
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"


@dataclass(frozen=True)
class Finding:
    """A bar or a claim, whether it holds, and the numbers. A note has no bar."""

    bar: str
    verdict: Verdict | None
    sentence: str


def count(findings: Sequence[Finding]) -> str:
    """How many claims hold, and so on."""
    counted = Counter(finding.verdict for finding in findings)
    plural = {"holds": "hold", "does not hold": "do not hold", "cannot be judged": "cannot be judged"}
    told = [
        f"{counted[verdict]} {verdict if counted[verdict] == 1 else plural[verdict]}"
        for verdict in get_args(Verdict)
        if counted[verdict]
    ]
    return ", ".join(told) or "no claim"


def notes(sentences: Sequence[str]) -> list[Finding]:
    """What is told beside the claims."""
    return [Finding("", None, sentence) for sentence in sentences]


def at_edge(tuned: str, cases: Sequence[str]) -> list[str]:
    """A sentence on the cases in which what was tuned came out at an end of its grid, if there are any."""
    if not cases:
        return []
    return [f"The tuned {tuned} lies at an edge of the grid, and may be better beyond it, for: {'; '.join(cases)}."]


@cache
def resamples(seeds: int) -> Rows:
    """Rows that bootstrap resamples draw, (DRAWS, seeds). All that shares seeds is resampled by the same ones."""
    return np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))


def resampled(values: Array, statistic: Callable[[Array], Array | float] | None = None) -> Array:
    """The statistic (the mean) of values (S, ...) on bootstrap resamples of the seeds, the first axis: (DRAWS, ...)."""
    rows = resamples(len(values))
    if statistic is None:
        return values[rows].mean(axis=1)
    return np.stack([statistic(values[chosen]) for chosen in rows])


def over_seeds(values: Array, statistic: Callable[[Array], float] | None = None) -> Estimate:
    """A statistic (the mean) of values (S, ...), one row a seed, with its 95% bootstrap interval (see `bounds`).

    One seed has no interval: it is not a number then.
    """
    if statistic is None:
        values = values.reshape(len(values), -1).mean(axis=1)
    value = float(values.mean()) if statistic is None else float(statistic(values))
    return interval(value, resampled(values, statistic) if len(values) > 1 else np.array([]), len(values))


def over_rows(seeds: int, statistic: Callable[[Rows], float]) -> Estimate:
    """A statistic of the seeds at some positions, as `over_seeds`: for what chooses anew in every resample."""
    draws = [statistic(rows) for rows in resamples(seeds)] if seeds > 1 else []
    return interval(float(statistic(np.arange(seeds))), np.array(draws), seeds)


def interval(value: float, draws: Array, seeds: int) -> Estimate:
    """A number with the bounds of what the resamples gave; without any, or if it is none, it has no interval."""
    if not len(draws) or not np.isfinite(value):
        return Estimate(value, np.nan, np.nan)
    low, high = bounds(value, draws, seeds)
    return Estimate(value, float(low), float(high))


def bounds(value: Array | float, draws: Array, seeds: int) -> tuple[Array, Array]:
    """The ends of the 95% interval of what the resamples (DRAWS, ...) gave, without what is not a number.

    Percentiles of resamples of few seeds are too close together: those of a mean of n normal numbers cover it as rarely
    as 50% of the time at n = 2 and 85% at n = 5. So their distances to the value are widened by what makes that case
    exact, t_{n-1} / z sqrt(n / (n - 1)) at 97.5% (Hesterberg 2015, arXiv:1411.5279): 9.2, 1.6, 1.02 for n = 2, 5, 100.
    """
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return value + widening(seeds) * (low - value), value + widening(seeds) * (high - value)


def widening(seeds: int) -> float:
    """What makes the percentiles of a mean of so many normal numbers cover it as often as they say."""
    tail = (1 + CONFIDENCE) / 2
    return float(t.ppf(tail, seeds - 1) / norm.ppf(tail) * np.sqrt(seeds / (seeds - 1)))


def ratio_of_means(first: Array, second: Array) -> Estimate:
    """Of values (S,) of the same seeds; where all of them are positive, so is the interval."""
    pairs = np.stack([first, second], axis=1)

    def ratio(rows: Array) -> float:
        return float(rows[:, 0].mean() / rows[:, 1].mean())

    if (pairs > 0).all():
        return over_seeds(pairs, lambda rows: float(np.log(ratio(rows)))).exp()
    return over_seeds(pairs, ratio)


def geometric_mean(values: Array) -> Estimate:
    """Of values (S,), one a seed; its interval is above 0."""
    return over_seeds(np.log(values)).exp()
