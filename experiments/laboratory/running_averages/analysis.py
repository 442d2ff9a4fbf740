"""Lag and noise of every average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array
from experiments.jobs import Result
from experiments.laboratory.running_averages.smoothing import AVERAGES, PHASES, SIGNALS
from experiments.laboratory.schemas import RunningAveragesConfig

LABELS = {
    "mean": "simple mean",
    "ewma": "EWMA from zero",
    "debiased_ewma": "EWMA, debiased",
    "slides": "min(t, N) mean",
    "window": "mean of the last 2N - 1",
}


@dataclass(frozen=True)
class Analysis:
    """tracking, noise: (seeds, horizons, averages, signals, phases), noise in units of that of the data; the others:
    (seeds, horizons, averages), as `measure` has them. shown: what `trace` found."""

    settings: RunningAveragesConfig
    shown: dict[str, Any]
    tracking: Array
    noise: Array
    noise_at_horizon: Array
    level: Array
    level_of_start: Array
    apart: Array

    @property
    def horizons(self) -> Array:
        return np.array(self.settings.horizons, dtype=float)


def analyse(settings: RunningAveragesConfig, results: Sequence[Result]) -> Analysis:
    measured = [result for result in results if "draws" in result.coordinates]
    (shown,) = (result.found for result in results if "draws" not in result.coordinates)

    def axis(name: str) -> Array:
        return cube(measured, ("seed", "horizon"), lambda found: found[name]).values

    return Analysis(
        settings,
        shown,
        tracking=axis("tracking"),
        noise=axis("noise") / settings.noise**2,
        noise_at_horizon=axis("noise_at_horizon") / settings.noise**2,
        level=axis("level"),
        level_of_start=axis("level_of_start"),
        apart=axis("apart"),
    )


def of(values: Array, kind: str, signal: str, phase: str) -> Array:
    """(seeds, horizons)"""
    return values[:, :, AVERAGES.index(kind), SIGNALS.index(signal), PHASES.index(phase)]
