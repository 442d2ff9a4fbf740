"""Steps of several contestants take turns, so that a change of the machine's speed meets all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def alternate(contestants: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """Their order in one turn after the other, without end: who was first is last in the next."""
    order = tuple(contestants)
    while True:
        yield order
        order = (*order[1:], *order[:1])


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios, turn by turn; of a single one, itself."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return ratios * 3 if len(ratios) == 1 else statistics.quantiles(ratios, n=4, method="inclusive")
