"""How the time grows along a scale: t ~ x^slope, fitted to the logarithms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.benchmarks.contestants import CONTESTANTS, SCALED
from experiments.benchmarks.results import Results, Row, row
from experiments.benchmarks.workloads import SCALES, point


@dataclass(frozen=True)
class Growth:
    """Of one contestant along one scale, in milliseconds; slopes over all of its values."""

    scale: str
    title: str
    symbol: str
    contestant: str
    statistic: str
    values: list[int]
    plain_ms: list[float]
    ms: list[float]
    ratio: list[float]
    plain_slope: float
    slope: float


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares of ln y on ln x; two different x at least."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def growths(results: Results) -> list[Growth]:
    """Of what was measured at two values at least."""
    found = []
    for name, scale in SCALES.items():
        for contestant in SCALED:
            rows = {value: row(results, point(name, value), contestant) for value in scale.every()}
            measured: dict[int, Row] = {value: r for value, r in rows.items() if r.ratio is not None}
            if len(measured) < 2:
                continue
            values = list(measured)
            plain = [r.plain_ms or 0.0 for r in measured.values()]
            own = [r.ms or 0.0 for r in measured.values()]
            ratios = [r.ratio or 0.0 for r in measured.values()]
            statistic = CONTESTANTS[contestant].statistic
            slopes = slope(values, plain), slope(values, own)
            found.append(
                Growth(name, scale.title, scale.symbol, contestant, statistic, values, plain, own, ratios, *slopes)
            )
    return found
