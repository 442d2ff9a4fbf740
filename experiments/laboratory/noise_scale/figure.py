"""The figure of noise_scale: along the run, by layer, the error of estimates, and steps over the batch size."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import across_batch_sizes, headroom, interval_band
from experiments.estimate import Array
from experiments.laboratory.knee import steps_law
from experiments.laboratory.noise_scale.analysis import Analysis
from experiments.laboratory.noise_scale.measure import METHODS, WHOLE
from experiments.themes import Theme, canvas, plain_log_ticks

MARKERS = ("o", "s", "^", "D")


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        f"Top: the noise scale over the training set along a run of B = {s.followed_batch_size} at its tuned learning "
        "rate, of all parameters and of each layer; markers: of all parameters, from "
        f"{s.draws} draws of {s.big} examples, by the norms of examples and of shards of {s.small}. Bottom: steps to "
        "each training loss over the batch size, at the quickest learning rate (arrows: more than runs had); line: the "
        "fit S_min (1 + B_crit/B); vertical lines: the critical batch size, measured (dashed) and told by the noise "
        f"scale (dotted). Geometric means over {len(s.seeds)} seeds; the band is the 95% interval of all parameters."
    )


def alternative(found: Analysis) -> str:
    told = "; ".join(
        f"{label} at {target:g} nats: {found.measured_size(label, target)} measured, "
        f"{found.predicted_size(label, target)} told"
        for label in found.settings.contestants
        for target in found.settings.targets
    )
    return f"Noise scales along runs, and steps to a loss over the batch size. Critical batch sizes: {told}."


def draw(found: Analysis, theme: Theme) -> Figure:
    labels = found.contest.labels
    with canvas(theme, max(5.0, 4.2 * len(labels)), 7.0, len(found.settings.seeds)) as figure:
        panels: Any = figure.subplots(2, len(labels), squeeze=False)
        for i, label in enumerate(labels):
            _along(panels[0, i], found, label, theme)
            _steps(panels[1, i], found, label, theme)
        panels[0, 0].set_ylabel("noise scale tr Sigma / |G|^2 (examples)")
        panels[1, 0].set_ylabel("steps to the loss")
    return figure


def _along(axes: Axes, found: Analysis, label: str, theme: Theme) -> None:
    one = found.followed[label]
    colours = [theme.reference, *theme.baselines]
    for group, colour in zip((WHOLE, *found.layers), cycle(colours), strict=False):
        scale = one.scale(group)
        axes.plot(one.examples, np.exp(scale.mean(axis=0)), color=colour, linewidth=1.4, label=group)
        if group == WHOLE:
            interval_band(axes, one.examples, scale, colour)
    for method, colour, marker in zip(METHODS, theme.ours, ("o", "x"), strict=True):
        axes.plot(one.examples, _estimated(one.mean[method]), marker, color=colour, markersize=4, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    headroom(axes, 0.45)
    axes.set_xlabel("examples seen")
    axes.set_title(f"{label}: noise scale")
    axes.legend(fontsize=7, labelspacing=0.25, loc="upper left")


def _estimated(mean: Array) -> Array:
    """Of means over seeds, (T,); none where the estimate of |G|^2 is not above zero."""
    of = mean[:, :, 0].mean(axis=0)
    found: Array = np.where(of[:, 0] > 0, of[:, 1] / np.where(of[:, 0] > 0, of[:, 0], 1), np.nan)
    return found


def _steps(axes: Axes, found: Analysis, label: str, theme: Theme) -> None:
    s, everyone = found.settings, found.contest.everyone
    sizes = np.array(s.batch_sizes, dtype=float)
    fine = np.geomspace(sizes.min(), sizes.max(), 60)
    colours = cycle([theme.ours[0], *theme.baselines])
    for target, colour, marker in zip(s.targets, colours, cycle(MARKERS), strict=False):
        steps, knee = found.steps(label, target, everyone), found.knee(label, target, everyone)
        axes.plot(sizes, steps, marker, color=colour, markersize=4, label=f"loss {target:g}")
        censored = [one for one in found.arrivals[label, target] if one.is_censored]
        at, bounds = [one.batch_size for one in censored], [one.bound for one in censored]
        axes.plot(at, bounds, color=colour, marker="$\\uparrow$", markersize=7, linestyle="none")
        axes.plot(fine, knee.at(steps_law, fine), color=colour, linewidth=1.2)
        for size, style in ((knee.size, "--"), (found.predicted(label, target, everyone), ":")):
            if np.isfinite(size):
                axes.axvline(size, color=colour, linewidth=1.0, linestyle=style)
    across_batch_sizes(axes, s.batch_sizes)
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xticks(s.batch_sizes, [str(size) for size in s.batch_sizes])
    axes.set_title(f"{label}: steps to a loss")
    axes.legend(fontsize=7.5, labelspacing=0.25)
