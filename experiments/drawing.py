"""What figures have in common: logarithmic axes, an axis of batch sizes, bands and bars over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiments.estimate import Array, Estimate, bounds, resampled
from experiments.themes import plain_log_ticks


def logarithmic(axes: Axes, across: str, up: str, title: str) -> None:
    """Both axes, with their labels."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title)


def across_batch_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each of the sizes, and no other."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size B")


def headroom(axes: Axes, share: float) -> None:
    """Above the curves, for a legend, so much of a logarithmic axis' length."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** share)
    plain_log_ticks(axes)


def range_band(axes: Axes, x: Any, values: Array, colour: Any, alpha: float = 0.15) -> None:
    """From the lowest to the highest of values (S, T)."""
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=alpha, linewidth=0)


def interval_band(axes: Axes, x: Any, logarithms: Array, colour: Any) -> None:
    """The 95% interval of the geometric mean over seeds of what has these natural logarithms (S, T); none of one."""
    if len(logarithms) < 2:
        return
    low, high = np.exp(bounds(logarithms.mean(axis=0), resampled(logarithms), len(logarithms)))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def bars(estimates: Sequence[Estimate]) -> Array:
    """From each number down and up to the ends of its interval, (2, N); none where it has no interval."""
    ends = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]])
    return np.nan_to_num(ends).clip(min=0)
