"""Running averages of a noisy signal, one example at a time: lag behind the signal, and what is left of the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.estimate import Array
from gradstats.units import average

# Those of gradstats.units with decay 1 - 1/N, and a window whose noise is that of the exponential ones.
AVERAGES = ("mean", "ewma", "debiased_ewma", "slides", "window")
SIGNALS = ("offset", "cosine")
PHASES = ("warm-up", "settled")

EARLY = 1 / 4  # of a horizon: averages that start alike have not begun to forget
SHOWN_HORIZONS, SHOWN_PERIODS, SHOWN_POINTS = 4, 2, 250


def window(horizon: int) -> int:
    """2N - 1 examples: the mean of so many keeps the share (1 - beta) / (1 + beta) of the noise, beta = 1 - 1/N."""
    return 2 * horizon - 1


def signals(examples: int, period: int, offset: float) -> Array:
    """(T, signals)"""
    t = np.arange(1, examples + 1)
    return np.stack([np.full(examples, offset), np.cos(2 * np.pi * t / period)], axis=1)


def averaged(kind: str, horizon: int, x: Array) -> Array:
    """The average after each example of x (T, ...)."""
    seen = np.arange(1, len(x) + 1).reshape(-1, *(1 for _ in x.shape[1:]))
    if kind == "window":
        n = window(horizon)
        sums = np.cumsum(x, axis=0)
        return np.concatenate([sums[:n], sums[n:] - sums[:-n]]) / np.minimum(seen, n)
    rule = average(kind, 1 - 1 / horizon, 1)
    values, now = np.empty_like(x), np.zeros(x.shape[1:])
    for i, example in enumerate(x):
        now = now + rule.weight(1, i + 1) * (example - now)
        values[i] = now
    return values


def split_error(values: Array, signal: Array) -> tuple[Array, Array]:
    """Mean square error over draws, of values (T, signals, draws), as tracking error and noise, each (T, signals).

    Tracking is (E x~ - signal)^2, whose estimate from the mean over D draws is too large by var / D; noise is var x~.
    """
    noise = values.var(axis=2, ddof=1)
    return (values.mean(axis=2) - signal) ** 2 - noise / values.shape[2], noise


def measure(
    horizon: int, examples: int, period: int, offset: float, noise: float, draws: int, seed: int
) -> dict[str, Any]:
    """All averages of one horizon N, on the same draws. Every list has the order of AVERAGES.

    tracking, noise: (averages, signals, phases), means over the examples of a phase: up to N, and the second half of
    all. noise_at_horizon: after N examples. level: on the offset, the mean over the first N/4 examples and over draws,
    in units of 1 - beta^t and of the offset. apart: from the simple mean over these examples, root mean square, in
    units of its standard deviation.
    """
    signal = signals(examples, period, offset)
    random = np.random.default_rng(seed)
    x = signal[:, :, None] + noise * random.normal(size=(examples, 1, draws))  # (T, signals, draws)
    phases = (slice(0, horizon), slice(examples // 2, None))
    early = slice(0, math.ceil(EARLY * horizon))
    start = 1 - (1 - 1 / horizon) ** np.arange(1, examples + 1)[early]
    simple = averaged("mean", horizon, x)[early, 0]
    found: dict[str, Any] = {
        name: [] for name in ("tracking", "noise", "noise_at_horizon", "level_of_start", "level", "apart")
    }
    for kind in AVERAGES:
        values = averaged(kind, horizon, x)
        tracking, left = split_error(values, signal)
        found["tracking"].append([[tracking[phase, i].mean() for phase in phases] for i in range(len(SIGNALS))])
        found["noise"].append([[left[phase, i].mean() for phase in phases] for i in range(len(SIGNALS))])
        found["noise_at_horizon"].append(left[horizon - 1, 0])
        first = values[early, 0]
        found["level_of_start"].append((first.mean(axis=1) / start).mean() / offset)
        found["level"].append(first.mean() / offset)
        found["apart"].append(math.sqrt(((first - simple) ** 2).mean() / simple.var(axis=1, ddof=1).mean()))
    return found


def trace(horizon: int, examples: int, period: int, offset: float, noise: float, seed: int) -> dict[str, Any]:
    """One draw, for the figure: by signal the counts of examples, the data, and the averages in their order."""
    signal = signals(examples, period, offset)
    x = signal + noise * np.random.default_rng(seed).normal(size=(examples, 1))
    values = [averaged(kind, horizon, x) for kind in AVERAGES]
    shown: dict[str, Any] = {}
    for i, (name, length) in enumerate(zip(SIGNALS, (SHOWN_HORIZONS * horizon, SHOWN_PERIODS * period), strict=True)):
        at = np.arange(0, min(length, examples), max(1, length // SHOWN_POINTS))
        shown[name] = {
            "examples": (at + 1).tolist(),
            "signal": signal[at, i].tolist(),
            "data": x[at, i].tolist(),
            "averages": [average[at, i].tolist() for average in values],
        }
    return shown
