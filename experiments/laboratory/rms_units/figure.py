"""How predictions change with the units, over steps, and the final loss along the learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.drawing import interval_band
from experiments.laboratory.rms_units.analysis import EXPONENTS, LABELS, UNIT_LABELS, UNITS, Analysis
from experiments.laboratory.rms_units.findings import EXACT
from experiments.themes import Theme, canvas, plain_log_ticks

SMALLEST = 1e-17  # an exact zero, on a logarithmic axis


def caption(analysis: Analysis) -> str:
    settings = analysis.settings
    return (
        f"Top: how far predictions on the digits are from those of the same training in the original units, "
        f"with weights {settings.weight_scale:g} times as large in one layer and as small in the other, or a "
        f"loss {settings.loss_scale:g} times as large; dashed: with eps held fixed instead of following the "
        "units. Bottom: final training loss along the learning rate, each with its best floor. "
        f"{len(settings.seeds)} seeds; bands are 95% intervals."
    )


def alternative(analysis: Analysis) -> str:
    moved = "; ".join(
        f"{LABELS[x]} in {UNIT_LABELS[units]}: {analysis.largest(x, units, True):.1e}"
        for x in EXPONENTS
        for units in UNITS[1:]
    )
    return (
        f"Change of predictions over steps, at most {moved}. Final loss along the learning rate, "
        f"at best {analysis.loss(0.5, 'original', 'original')} for g/sigma and "
        f"{analysis.loss(1.0, 'original', 'original')} for g/sigma^2."
    )


def draw(analysis: Analysis, theme: Theme) -> Figure:
    colours = dict(zip(EXPONENTS, (theme.baselines[1], theme.ours[0]), strict=True))
    with canvas(theme, 8.0, 6.2) as figure:
        rows: Any = figure.subfigures(2, 1)
        above: Any = rows[0].subplots(1, 2, sharey=True)
        for axes, units in zip(above, UNITS[1:], strict=True):
            _deviation(axes, analysis, units, colours)
            axes.axhline(EXACT, color=theme.faint, linewidth=0.8, linestyle=":")
            axes.set_title(f"Predictions, {UNIT_LABELS[units]}")
        above[0].set_ylabel("change of predictions,\n||f - f'|| / ||f||")
        below: Any = rows[1].subplots(1, 3, sharey=True)
        for axes, units in zip(below, UNITS, strict=True):
            _along_lr(axes, analysis, units, colours)
            axes.set_title(UNIT_LABELS[units].capitalize())
            plain_log_ticks(axes)
        below[0].set_ylabel("final training loss (nats)")
        figure.legend(
            [
                *(Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()),
                Line2D([], [], color=theme.ink, linestyle="--"),
            ],
            [*(LABELS[x] for x in EXPONENTS), "eps held fixed"],
            loc="outside lower center",
            ncols=3,
        )
    return figure


def _deviation(axes: Axes, analysis: Analysis, units: str, colours: dict[float, str]) -> None:
    for (exponent, of, follows), values in analysis.deviation.items():
        if of == units:
            mean = np.exp(np.log(np.maximum(values, SMALLEST)).mean(0))
            line, marker = ("-", "o") if follows else ("--", None)
            axes.plot(analysis.steps, mean, line, marker=marker, color=colours[exponent], markersize=3, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(analysis.steps[::2], [str(step) for step in analysis.steps[::2]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("steps")


def _along_lr(axes: Axes, analysis: Analysis, units: str, colours: dict[float, str]) -> None:
    """At each learning rate the best floor, with the band of that floor."""
    for x, (exponent, colour) in enumerate(colours.items()):
        values = analysis.log_loss[:, x, UNITS.index(units)]  # (S, K, F)
        floors = values.mean(0).argmin(1)
        along = values[:, np.arange(len(floors)), floors]  # (S, K)
        axes.plot(analysis.lrs[x], np.exp(along.mean(0)), color=colour, marker="o", markersize=3, linewidth=1.4)
        interval_band(axes, analysis.lrs[x], along, colour)
        axes.axvline(
            analysis.lrs[x][analysis.chosen(exponent, "original")[0]], color=colour, linewidth=0.8, linestyle=":"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("learning rate")
