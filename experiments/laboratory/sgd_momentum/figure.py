"""Momentum on the quadratic: warm-up, total effects, batch sizes, near-zero gradients; and curves on the digits."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.drawing import across_batch_sizes, bars
from experiments.estimate import Array, over_seeds
from experiments.laboratory.sgd_momentum.analysis import LABELS, SCALINGS, UNITS, Analysis
from experiments.themes import Theme, canvas, plain_log_ticks

# On the quadratic at the tuned batch size "heavy_ball" and "ewma" are the curve of "torch".
SHOWN = ("torch", "dampened", "plain", "debiased_ewma", "slides")
STYLES: dict[str, Any] = {"slides": "--", "plain": ":"}
WIDTHS = {"dampened": 4.5, "debiased_ewma": 2.8}  # curves that coincide
NAMES = {"torch": "heavy ball, torch's and ours"}
WARM_UP = 8  # horizons


def caption(analysis: Analysis) -> str:
    settings = analysis.settings
    return (
        f"Top and middle: the quadratic, N = {settings.horizon:g} examples, at B = {settings.tuning_batch_size} unless "
        "B is the axis. Distance covered: one minus the mean of theta, in units of lr0 times examples. Lines in the "
        "panel of the variance: closed form of torch's heavy ball. Near-zero gradients: both in units of what they are "
        "when all examples are informative. Bottom: training loss on the digits, geometric mean over seeds, one line "
        f"a batch size, lr at B = {settings.tuning_batch_size}. Means over {len(settings.seeds)} seeds; vertical "
        "lines are 95% intervals where larger than a point."
    )


def alternative(analysis: Analysis) -> str:
    scores = ", ".join(
        f"{LABELS[scaling]} at {fraction:g} times the tuned lr {analysis.score(scaling, fraction).mean():.2g}"
        for scaling, fraction in product(SCALINGS, analysis.settings.lr_fractions)
    )
    return (
        "Distance covered in the warm-up, total effect of a batch, settled variance and time to a tenth over batch "
        f"sizes, near-zero gradients, and learning curves on the digits. Scores over batch sizes: {scores}."
    )


def draw(analysis: Analysis, theme: Theme) -> Figure:
    colours = dict(
        zip(SHOWN, (theme.reference, theme.baselines[0], theme.faint, theme.ours[0], theme.baselines[2]), strict=True)
    )
    units = dict(zip(UNITS, (theme.reference, theme.ours[0]), strict=True))
    with canvas(theme, 8.0, 8.4) as figure:
        rows: Any = figure.subfigures(3, 1, height_ratios=(1, 1, 1))
        above, middle, below = rows
        warm_up, effect = above.subplots(1, 2)
        _warm_up(warm_up, analysis, colours)
        _total_effect(effect, analysis, colours)
        handles = [
            Line2D([], [], color=colours[name], linestyle=STYLES.get(name, "-"), linewidth=WIDTHS.get(name, 1.6))
            for name in SHOWN
        ]
        names = [NAMES.get(name, LABELS[name]) for name in SHOWN]
        above.legend(handles, names, loc="outside lower center", ncols=5, fontsize=7.5, handlelength=1.6)
        variance, time, near_zero = middle.subplots(1, 3)
        _variance(variance, analysis, units)
        _time(time, analysis, units)
        _near_zero(near_zero, analysis, theme)
        fractions = analysis.settings.lr_fractions
        panels = below.subplots(1, 2 * len(fractions), sharex=True, sharey=True)
        for axes, (fraction, scaling) in zip(panels, product(fractions, ("linear", "ours")), strict=True):
            _learning_curves(axes, analysis, scaling, fraction, theme)
        panels[0].set_ylabel("training loss (nats)")
        sizes = analysis.settings.batch_sizes
        panels[0].legend([f"B = {size}" for size in sizes], fontsize=7.5, handlelength=1.2, labelspacing=0.25)
    return figure


def _warm_up(axes: Axes, analysis: Analysis, colours: dict[str, str]) -> None:
    lr, horizon = analysis.settings.lr, analysis.settings.horizon
    shown = (analysis.examples > 0) & (analysis.examples <= WARM_UP * horizon)
    examples = analysis.examples[shown]
    for name in SHOWN:
        covered = (1 - analysis.mean[name][:, shown].mean(axis=0)) / (lr * examples)
        axes.plot(
            examples / horizon, covered, STYLES.get(name, "-"), color=colours[name], linewidth=WIDTHS.get(name, 1.6)
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("examples seen, in horizons N")
    axes.set_ylabel("distance covered /\n(lr0 x examples)")
    axes.set_title("The warm-up")
    plain_log_ticks(axes)


def _total_effect(axes: Axes, analysis: Analysis, colours: dict[str, str]) -> None:
    for name in SHOWN:
        examples, effect = analysis.effect[name, False]
        axes.plot(
            examples / analysis.settings.horizon,
            effect,
            STYLES.get(name, "-"),
            color=colours[name],
            linewidth=WIDTHS.get(name, 1.6),
            marker="o" if name == "dampened" else None,
            markersize=3,
            markevery=[0],
        )
    axes.set_yscale("log")
    axes.set_xlabel("examples seen before the batch, in horizons N")
    axes.set_ylabel("total effect of a batch /\n(lr0 x sum of its gradients)")
    axes.set_title("What one batch does, sooner or later")
    plain_log_ticks(axes)


def _variance(axes: Axes, analysis: Analysis, colours: dict[str, str]) -> None:
    sizes = np.array(analysis.settings.batch_sizes, dtype=float)
    for unit, colour in colours.items():
        axes.plot(sizes, analysis.closed_form(unit), color=colour, linewidth=1)
        _points(axes, sizes, analysis.variance_by_size[unit], colour, line="")
    _over_batch_sizes(axes, analysis)
    axes.set_ylabel("variance of theta")
    axes.set_title("Settled noise")


def _time(axes: Axes, analysis: Analysis, colours: dict[str, str]) -> None:
    sizes = np.array(analysis.settings.batch_sizes, dtype=float)
    for unit, colour in colours.items():
        _points(axes, sizes, analysis.time_by_size[unit], colour)
    _over_batch_sizes(axes, analysis)
    axes.set_ylabel("examples")
    axes.set_title("Time to a tenth")
    handles = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
    axes.legend(handles, ["lr, momentum kept", "lr0, N kept"], fontsize=7.5, handlelength=1.4)


def _near_zero(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    shares = np.array(analysis.settings.informative)
    speed = 1 / (analysis.time_by_share * shares)
    memory = shares**2 / analysis.of_average
    for values, colour, label in (
        (speed, theme.ours[0], "progress of each"),
        (memory, theme.baselines[0], "how many are averaged"),
    ):
        _points(axes, shares, values / values[:, -1:], colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xticks(shares, [f"1/{1 / share:g}" if share < 1 else "1" for share in shares])
    axes.set_xlabel("informative share of examples")
    axes.set_ylabel("relative to all informative")
    axes.set_title("Near-zero gradients")
    axes.legend(fontsize=7.5, handlelength=1.4)


def _learning_curves(axes: Axes, analysis: Analysis, scaling: str, fraction: float, theme: Theme) -> None:
    late = analysis.counts > 0
    curves = np.exp(analysis.digits[scaling, fraction].mean(axis=0))[:, late]  # (B, T)
    for curve, x in zip(curves, np.linspace(0, 1, len(curves)), strict=True):
        axes.plot(analysis.counts[late], curve, color=theme.batch_sizes(x), linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("examples seen")
    axes.set_title(f"{LABELS[scaling]},\nlr {analysis.lr * fraction:.2g}")
    plain_log_ticks(axes)


def _points(axes: Axes, x: Array, values: Array, colour: str, line: str = "-", label: str | None = None) -> None:
    """values (S, len(x)), with their intervals over seeds."""
    estimates = [over_seeds(values[:, i]) for i in range(values.shape[1])]
    style: Any = {"color": colour, "marker": "o", "markersize": 4, "linestyle": line, "linewidth": 1.2}
    axes.errorbar(x, [estimate.value for estimate in estimates], yerr=bars(estimates), label=label, **style)


def _over_batch_sizes(axes: Axes, analysis: Analysis) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes)
    across_batch_sizes(axes, analysis.settings.batch_sizes)
