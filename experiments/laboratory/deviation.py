"""How far measurements are from what they should be, wherever they are furthest."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Array, Estimate, bounds, resampled


def largest_deviation(measured: Array, expected: Array) -> Estimate:
    """Relative, of means over seeds (S, ...) from numbers (...): the largest of all.

    Its interval goes from the largest deviation that is certain to the largest that cannot be excluded, by the
    bootstrap over seeds of each number by itself. One seed has no interval.
    """
    found = measured.mean(axis=0) / expected - 1
    value = float(np.abs(found).max())
    if len(measured) < 2:
        return Estimate(value, np.nan, np.nan)
    low, high = bounds(found, resampled(measured) / expected - 1, len(measured))
    certain = np.maximum(low, -high).max()
    return Estimate(value, max(0.0, float(certain)), float(np.maximum(-low, high).max()))
