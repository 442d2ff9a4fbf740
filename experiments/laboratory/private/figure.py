"""Accuracy lost to privacy by epsilon, the learning rate, and the noise in Adam's second moment."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.drawing import bars, interval_band
from experiments.laboratory.private.analysis import Analysis
from experiments.laboratory.private.methods import ADAM, METHODS
from experiments.themes import Theme, canvas, plain_log_ticks

MARKERS = ("o", "s", "^")


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        f"Digits, expected batch size {s.batch_size}, C = {s.max_norm:g}, delta = {s.delta:g}, {s.epochs:g} epochs. "
        "Left: held-out accuracy, in percentage points below that of the same method without privacy, by epsilon, each "
        f"at its tuned learning rate. Middle: final training loss along the learning rate, in octaves from each "
        f"method's own, at epsilon = {s.epsilons[len(s.epsilons) // 2]:g}. Right: the part of {ADAM}'s second moment "
        f"that is the variance of the noise. Means over {len(s.seeds)} seeds, in the middle geometric ones; bars and "
        "bands are 95% intervals."
    )


def alternative(found: Analysis) -> str:
    told = "; ".join(
        f"epsilon = {e:g}: " + ", ".join(f"{method} {found.lost(method, e)}" for method in METHODS)
        for e in found.settings.epsilons
    )
    return f"Points of held-out accuracy lost to privacy. {told}."


def draw(found: Analysis, theme: Theme) -> Figure:
    colours = dict(zip(METHODS, (theme.reference, theme.baselines[1], theme.ours[0]), strict=True))
    with canvas(theme, 8.4, 3.6, len(found.settings.seeds)) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        _lost(left, found, colours)
        _along_lr(middle, found, colours)
        _noise(right, found, colours[ADAM])
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))
    return figure


def _across_epsilons(axes: Axes, found: Analysis) -> None:
    epsilons = found.settings.epsilons
    axes.set_xscale("log")
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("epsilon (to the right: less private)")


def _lost(axes: Axes, found: Analysis, colours: dict[str, Any]) -> None:
    for i, (method, marker) in enumerate(zip(METHODS, MARKERS, strict=True)):
        estimates = [found.lost(method, epsilon) for epsilon in found.settings.epsilons]
        # Side by side, so that bars do not hide each other.
        x = np.array(found.settings.epsilons) * 1.04 ** (i - 1)
        values = [100 * estimate.value for estimate in estimates]
        axes.errorbar(
            x,
            values,
            yerr=100 * bars(estimates),
            color=colours[method],
            marker=marker,
            markersize=4.5,
            linewidth=1.3,
            capsize=2,
            label=method,
        )
    axes.axhline(0, color=axes.spines["left"].get_edgecolor(), linewidth=0.8, linestyle=":")
    _across_epsilons(axes, found)
    axes.set_ylabel("held-out accuracy lost (points)")
    axes.set_title("What privacy costs")


def _along_lr(axes: Axes, found: Analysis, colours: dict[str, Any]) -> None:
    epsilon = found.settings.epsilons[len(found.settings.epsilons) // 2]
    for method, marker in zip(METHODS, MARKERS, strict=True):
        runs = found.runs[method, epsilon]
        axes.plot(
            runs.octaves,
            np.exp(runs.log_loss.mean(axis=0)),
            color=colours[method],
            marker=marker,
            markersize=3.5,
            linewidth=1.3,
        )
        interval_band(axes, runs.octaves, runs.log_loss, colours[method])
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xlabel("log2(lr / the method's own)")
    axes.set_ylabel("final training loss (nats)")
    axes.set_title(f"Tuning, epsilon = {epsilon:g}")


def _noise(axes: Axes, found: Analysis, colour: Any) -> None:
    estimates = [found.noise_share(ADAM, epsilon) for epsilon in found.settings.epsilons]
    values = [100 * estimate.value for estimate in estimates]
    axes.errorbar(
        found.settings.epsilons, values, yerr=100 * bars(estimates), color=colour, marker="s", markersize=4.5, capsize=2
    )
    _across_epsilons(axes, found)
    axes.set_ylim(0, 105)
    axes.set_ylabel("of the second moment (%)")
    axes.set_title(f"Noise in {ADAM}'s v")
