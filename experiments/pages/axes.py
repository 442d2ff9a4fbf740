"""From values to places on an axis, and the ticks beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments.estimate import Array

Scale = Literal["log", "linear"]
SCALES: tuple[Scale, ...] = ("log", "linear")

FEWEST_TICKS = 3
MOST_TICKS = 5
SMALLEST_SPAN = 1e-3  # of an axis on which nothing moves


@dataclass(frozen=True)
class Axis:
    """low and high are values, or their logarithms to base 10 where the scale is logarithmic."""

    scale: Scale
    low: float
    high: float

    def places(self, values: Array) -> Array:
        """0 at the low end and 1 at the high one; nan for what has no logarithm."""
        return (_transformed(values, self.scale) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        linear = self.scale == "linear"
        values = _even(self.low, self.high) if linear else _logarithmic(10**self.low, 10**self.high)
        return [
            (float(place), short(float(value)))
            for place, value in zip(self.places(values), values, strict=True)
            if -1e-9 <= place <= 1 + 1e-9
        ]


def axis(values: Array, scale: Scale, margin: float = 0.0) -> Axis | None:
    """Over all finite values, with a margin of its length on both sides.

    None where nothing is left, or a logarithm is asked of a negative value. Zero has no place on a logarithmic axis and
    is left out: the count of examples before the first step.
    """
    finite = values[np.isfinite(values)]
    if scale == "log":
        if (finite < 0).any():
            return None
        finite = finite[finite > 0]
    if not finite.size:
        return None
    low, high = (float(end) for end in _transformed(np.array([finite.min(), finite.max()]), scale))
    room = margin * (high - low) if high > low else max(abs(low) / 2, SMALLEST_SPAN)
    return Axis(scale, low - room, high + room)


def short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def _transformed(values: Array, scale: Scale) -> Array:
    if scale == "linear":
        return values
    return np.log10(values, out=np.full_like(values, np.nan), where=values > 0)


def _even(low: float, high: float) -> Array:
    return np.asarray(MaxNLocator(MOST_TICKS).tick_values(low, high), dtype=float)


def _logarithmic(low: float, high: float) -> Array:
    """Decades; 2 and 5 too, and then evenly spaced values, where the axis spans too few of them."""
    for subs in ((1.0,), (1.0, 2.0, 5.0)):
        values = np.asarray(LogLocator(subs=subs, numticks=MOST_TICKS + 1).tick_values(low, high), dtype=float)
        if FEWEST_TICKS <= np.count_nonzero((values >= low) & (values <= high)) <= MOST_TICKS + 1:
            return values
    even = _even(low, high)
    return even[even > 0]
