"""The figure of drift: drift against noise, the error of averages, their best horizon over time, and momentum."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import bars, headroom, logarithmic, range_band
from experiments.estimate import Array
from experiments.laboratory.drift.analysis import Analysis
from experiments.laboratory.drift.follow import IN_UNITS, WHOLE
from experiments.themes import Theme, canvas


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        f"Along runs of {s.method} whose momentum has a horizon of {s.horizons[found.best]} examples, the best. Top "
        "left: how much the gradient over the training set changes within n examples, and the noise of averages of "
        "horizon n, in the last phase of training. Top right: the squared error of the average of each horizon, over "
        "the noise of a batch, in each phase; dotted: of zero in place of an average. Bottom left: the horizon where "
        "drift equals noise, over time. Bottom right: final training loss against the horizon of the momentum, each at "
        "its tuned learning rate; vertical lines are where drift equals noise in the last phase. Bands are the range "
        f"over {len(s.seeds)} seeds, bars are intervals."
    )


def alternative(found: Analysis) -> str:
    last = len(found.bounds) - 1
    return (
        f"Four charts. In the last phase drift equals noise at {found.crossing(WHOLE, last).text()} examples, the "
        f"average of horizon {found.tracking(WHOLE, last).text()} is closest to the gradient, and momentum is best at "
        f"a horizon of {found.settings.horizons[found.best]}."
    )


def draw(found: Analysis, theme: Theme) -> Figure:
    with canvas(theme, 8.0, 6.6) as figure:
        panels: Any = figure.subplots(2, 2)
        _drift(panels[0, 0], found, theme)
        _errors(panels[0, 1], found, theme)
        _over_time(panels[1, 0], found, theme)
        _momentum(panels[1, 1], found, theme)
    return figure


def _line(axes: Axes, x: Any, values: Array, colour: Any, label: str, **style: Any) -> None:
    """Means of values (S, T), with the range over seeds."""
    axes.plot(x, values.mean(axis=0), color=colour, lw=1.4, label=label, **style)
    range_band(axes, x, values, colour)


def _drift(axes: Axes, found: Analysis, theme: Theme) -> None:
    last = len(found.bounds) - 1
    _line(axes, found.lengths, found.curve("drift", WHOLE, last), theme.baselines[1], "drift over n")
    _line(axes, found.lengths, found.curve("scatter", WHOLE, last), theme.ours[0], "noise of the average")
    axes.plot(
        found.lengths,
        found.expected_scatter(WHOLE, last).mean(axis=0),
        color=theme.ours[0],
        lw=1,
        linestyle=":",
        label="noise, independent batches",
    )
    axes.axhline(found.signal(WHOLE, last).mean(), color=theme.faint, lw=1, linestyle="--", label="||g||^2")
    logarithmic(axes, "n, in examples", "squared norm", "Drift against noise, last phase")
    axes.legend(fontsize=7.5, labelspacing=0.25)


def _errors(axes: Axes, found: Analysis, theme: Theme) -> None:
    shades = np.linspace(0, 1, len(found.bounds))
    for phase, ((a, b), shade) in enumerate(zip(found.bounds, shades, strict=True)):
        noise = found.noise_of_batch(WHOLE, phase)
        error = found.curve("error", WHOLE, phase) / noise[:, None]
        _line(axes, found.lengths, error, theme.batch_sizes(shade), f"{a:,} to {b:,}", marker="o", markersize=2.5)
        zero = found.signal(WHOLE, phase).mean() / noise.mean()
        axes.axhline(zero, color=theme.batch_sizes(shade), lw=0.9, linestyle=":")
    axes.axhline(1, color=theme.faint, lw=1, linestyle="--")
    logarithmic(axes, "horizon N of the average, in examples", "error / (tr Sigma / B)", "How close an average is")
    headroom(axes, 0.5)
    axes.legend(fontsize=7.5, labelspacing=0.25, title="examples seen", title_fontsize=7.5, loc="upper right")


def _over_time(axes: Axes, found: Analysis, theme: Theme) -> None:
    middles = [(a * b) ** 0.5 for a, b in found.bounds]
    colours = [theme.reference, theme.ours[0], *theme.baselines]
    groups = sorted(found.groups, key=lambda group: group not in (WHOLE, IN_UNITS))
    for i, (group, colour) in enumerate(zip(groups, colours, strict=False)):
        best = [found.crossing(group, phase) for phase in range(len(found.bounds))]
        value = [estimate.value for estimate in best]
        shifted = np.array(middles) * 1.03 ** (i - len(groups) / 2)
        axes.errorbar(
            shifted, value, yerr=bars(best), color=colour, marker="o", markersize=4, lw=1.3, capsize=2, label=group
        )
    logarithmic(axes, "examples seen", "horizon N, in examples", "Where drift equals noise")
    headroom(axes, 0.5)
    axes.legend(fontsize=7.5, labelspacing=0.25, loc="upper left")


def _momentum(axes: Axes, found: Analysis, theme: Theme) -> None:
    s, last = found.settings, len(found.bounds) - 1
    losses = np.stack([found.loss.values[:, i, lr] for i, lr in enumerate(found.tuned)], axis=1)  # (S, horizon)
    middle = np.exp(np.log(losses).mean(axis=0))
    axes.plot(s.horizons, middle, color=theme.ours[0], marker="o", markersize=4, lw=1.5)
    range_band(axes, s.horizons, losses, theme.ours[0])
    for group, colour in ((WHOLE, theme.reference), (IN_UNITS, theme.baselines[1])):
        axes.axvline(found.crossing(group, last).value, color=colour, lw=1, linestyle="--", label=group)
    logarithmic(
        axes, "horizon of the momentum, in examples", "final training loss (nats)", "Momentum, lr tuned for each"
    )
    axes.legend(fontsize=7.5, labelspacing=0.25, title="drift = noise", title_fontsize=7.5)
