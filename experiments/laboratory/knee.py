"""Laws over the batch size that bend at one of them, fitted in logarithms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.estimate import Array

BEYOND = 64  # times the largest batch size, and 1/64 of the smallest: where a knee is looked for
PER_OCTAVE = 16

Law = Callable[[Array], Array]  # ln of a value, of B / knee, up to a constant


def steps_law(ratio: Array) -> Array:
    """ln(S / S_min), S = S_min (1 + B_crit / B) (McCandlish et al. 2018, arXiv:1812.06162)."""
    found: Array = np.log1p(1 / ratio)
    return found


def surge_law(ratio: Array) -> Array:
    """ln(lr / lr_max), lr = lr_max / (1/2 (sqrt(B_noise/B) + sqrt(B/B_noise))) (Li et al. 2024, arXiv:2405.14578)."""
    found: Array = -np.log((ratio**-0.5 + ratio**0.5) / 2)
    return found


@dataclass(frozen=True)
class Knee:
    """size: the batch size at which the law bends; level: ln of its constant; misfit: the largest |ln value - law|.

    A size at an end of those that are tried is no number: the values do not bend.
    """

    size: float
    level: float
    misfit: float

    def at(self, law: Law, sizes: Array) -> Array:
        """The values of the law."""
        found: Array = np.exp(self.level + law(sizes / self.size))
        return found


def fitted(law: Law, sizes: Sequence[int], logs: Array) -> Knee:
    """By least squares of ln values, a batch size each; between the knees that are tried by a parabola."""
    if not np.isfinite(logs).all():
        return Knee(np.nan, np.nan, np.nan)
    B = np.array(sizes, dtype=float)
    first, last = np.log2(B.min() / BEYOND), np.log2(B.max() * BEYOND)
    octaves = np.linspace(first, last, round((last - first) * PER_OCTAVE) + 1)

    def residuals(knees: Array) -> tuple[Array, Array]:
        bends = law(B / 2 ** knees[:, None])  # (K, B)
        levels = (logs - bends).mean(axis=1)
        return logs - bends - levels[:, None], levels

    squares = (residuals(octaves)[0] ** 2).sum(axis=1)
    i = int(squares.argmin())
    if i in (0, len(octaves) - 1):
        return Knee(np.nan, np.nan, np.nan)
    left, middle, right = squares[i - 1 : i + 2]
    curvature = left - 2 * middle + right
    octave = octaves[i] + ((octaves[i + 1] - octaves[i]) * (left - right) / (2 * curvature) if curvature > 0 else 0)
    errors, levels = residuals(np.array([octave]))
    return Knee(float(2**octave), float(levels[0]), float(np.abs(errors).max()))
