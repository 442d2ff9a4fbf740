"""Where a curve is lowest, between the points at which it was measured."""

from __future__ import annotations

import math

import numpy as np

from experiments.estimate import Array


def lowest_point(octaves: Array, losses: Array) -> float:
    """Of the parabola through ln(loss) at the best octave and its neighbours; at an edge, the edge."""
    i = int(losses.argmin())
    if i in (0, len(octaves) - 1):
        return float(octaves[i])
    left, middle, right = np.log(np.maximum(losses[i - 1 : i + 2], np.finfo(float).tiny))
    curvature = left - 2 * middle + right
    if curvature <= 0 or not math.isfinite(curvature):
        return float(octaves[i])
    return float(octaves[i] + (octaves[i + 1] - octaves[i]) * (left - right) / (2 * curvature))
