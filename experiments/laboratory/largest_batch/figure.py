"""The figure of the largest batch: loss along the batch size, predictions against it, and along the run."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.contest.figure import MARKERS, colours
from experiments.drawing import across_batch_sizes, bars, headroom, logarithmic
from experiments.laboratory.largest_batch.analysis import Analysis
from experiments.laboratory.largest_batch.findings import BATCHES, measured
from experiments.laboratory.largest_batch.predictors import PREDICTORS
from experiments.themes import Theme, canvas, plain_log_ticks


def caption(found: Analysis) -> str:
    return (
        f"Left: final training loss over that at B = {found.home}, with the learning rate tuned there; invariance ends "
        f"at the dashed line, {found.settings.broken:g} times. Middle: the batch size where it ends, and what each "
        f"predictor says of it, in the same colours; an arrow marks what ends beyond B = {found.sizes[-1]}. Right: the "
        f"predictors along the run of {BATCHES}; the band is where invariance ends. Geometric means over "
        f"{len(found.settings.seeds)} seeds; bars and band are 95% intervals."
    )


def alternative(found: Analysis) -> str:
    told = "; ".join(f"{label} ends at {measured(found, label)}" for label in found.labels)
    predicted = ", ".join(f"{name} {found.prediction(BATCHES, name).text()}" for name in PREDICTORS)
    return f"Three charts. Invariance of {told}. Predictions for {BATCHES}: {predicted}."


def draw(found: Analysis, theme: Theme) -> Figure:
    with canvas(theme, 11.5, 4.2, len(found.settings.seeds)) as figure:
        panels: Any = figure.subplots(1, 3, width_ratios=(1, 1.15, 1))
        _loss(panels[0], found, theme)
        _predicted(panels[1], found, theme)
        _along(panels[2], found, theme)
    return figure


def _loss(axes: Axes, found: Analysis, theme: Theme) -> None:
    colour = colours(found, theme)
    for i, (label, marker) in enumerate(zip(found.labels, cycle(MARKERS), strict=False)):
        ratios = [found.broken(label, j) for j in range(len(found.sizes))]
        shifted = np.array(found.sizes) * 1.04 ** (i - len(found.labels) / 2)
        values = [ratio.value for ratio in ratios]
        axes.errorbar(
            shifted, values, bars(ratios), color=colour[label], marker=marker, ms=4, lw=1.3, capsize=2, label=label
        )
    axes.axhline(found.settings.broken, color=theme.faint, lw=1, linestyle="--")
    logarithmic(axes, "", f"training loss / that at B = {found.home}", "Loss with the lr tuned once")
    headroom(axes, 0.45)
    across_batch_sizes(axes, found.sizes)
    axes.legend(fontsize=7, labelspacing=0.25, loc="upper left")


def _predicted(axes: Axes, found: Analysis, theme: Theme) -> None:
    colour = colours(found, theme)
    rows = ["measured", *PREDICTORS]
    for i, label in enumerate(found.plain):
        values = [found.breakdown(label), *(found.prediction(label, name) for name in PREDICTORS)]
        heights = np.arange(len(rows)) + 0.18 * (i - (len(found.plain) - 1) / 2)
        axes.errorbar(
            [value.value for value in values],
            heights,
            xerr=bars(values),
            color=colour[label],
            marker=MARKERS[i],
            ms=4.5,
            lw=0,
            elinewidth=1.2,
            capsize=2,
        )
        if found.beyond(label):
            axes.plot(found.sizes[-1] * 1.4, heights[0], color=colour[label], marker=">", ms=4.5)
    axes.set_xscale("log")
    plain_log_ticks(axes)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axhline(0.5, color=theme.faint, lw=0.7)
    axes.set_xlabel("batch size B")
    axes.set_title("Where invariance ends")


def _along(axes: Axes, found: Analysis, theme: Theme) -> None:
    order = [
        theme.ours[0],
        theme.baselines[1],
        theme.baselines[0],
        theme.baselines[2],
        theme.ours[1],
        theme.baselines[3],
    ]
    for name, shade, marker in zip(PREDICTORS, order, MARKERS, strict=False):
        values = np.exp(found.predicted[BATCHES, name].mean(axis=0))
        axes.plot(found.examples[BATCHES], values, color=shade, marker=marker, ms=4, lw=1.3, label=name)
    ends = found.breakdown(BATCHES)
    axes.axhline(ends.value, color=theme.reference, lw=1, linestyle="--", label="measured")
    if np.isfinite([ends.low, ends.high]).all():
        axes.axhspan(ends.low, ends.high, color=theme.reference, alpha=0.12, lw=0)
    logarithmic(axes, "examples seen", "batch size B", f"Predictions along {BATCHES}")
    headroom(axes, 0.5)
    axes.legend(fontsize=7, labelspacing=0.25, loc="upper left", ncols=2)
