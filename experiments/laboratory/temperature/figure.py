"""The figure of temperature: at rest, in annealing, and in cycles."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import headroom, logarithmic, range_band
from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.temperature.analysis import ENSEMBLES, Analysis, expected_excesses, temperatures
from experiments.laboratory.temperature.wells import expected_excess
from experiments.themes import Theme, canvas, plain_log_ticks

WAYS = {
    (False, False): "constant",
    (True, False): "lr falls",
    (True, True): "B grows instead",
    (False, True): "B grows, eta/B kept",
}
MARKERS = ("o", "s", "^", "D", "v", "P")
TEMPERATURE = "eta/B (learning rate of one example)"


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        "Top: how far constant learning rates keep from a minimum, against eta/B; lines are theory with nothing "
        "fitted. Left on a quadratic, right on the data, with error bars over seeds (smaller than the symbols where "
        f"none shows). Middle: training loss when, at every dotted line, the learning rate per example falls by "
        f"{s.factor} or the batch grows by {s.factor}; right, how far two ways to anneal are apart. Bottom: test loss "
        f"of ensembles of {s.members} snapshots, and how far the snapshots are apart. Bars and bands are means and the "
        f"range over {found.seeds} seeds."
    )


def alternative(found: Analysis) -> str:
    ratio = found.excess.values.mean(axis=0) / expected_excesses(found)
    heat = temperatures(found)
    best = [found.tuned(i) for i in range(len(ENSEMBLES))]
    losses = "; ".join(
        f"{name} {found.tested.values[:, lr, i, 1].mean():.3g}"
        for i, (name, lr) in enumerate(zip(ENSEMBLES, best, strict=True))
    )
    return (
        f"Six charts. The excess loss over theory is {ratio.ravel()[heat.argmin()]:.3g} at the lowest eta/B and "
        f"{ratio.ravel()[heat.argmax()]:.3g} at the highest. Test losses: {losses}."
    )


def draw(found: Analysis, theme: Theme) -> Figure:
    with canvas(theme, 8.0, 9.0) as figure:
        panels: Any = figure.subplots(3, 2)
        _variance(panels[0, 0], found, theme)
        _excess(panels[0, 1], found, theme)
        _curves(panels[1, 0], found, theme)
        _apart(panels[1, 1], found, theme)
        _losses(panels[2, 0], found, theme)
        _distances(panels[2, 1], found, theme)
    return figure


def _points(axes: Axes, heat: Any, values: Any, colour: Any, marker: str, label: str) -> None:
    """Means of values (S, P), with the range over seeds."""
    middle = values.mean(axis=0)
    spread = [middle - values.min(axis=0), values.max(axis=0) - middle]
    axes.errorbar(heat, middle, yerr=spread, color=colour, fmt=marker, markersize=4.5, capsize=2, lw=0.9, label=label)


def _variance(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    for h, marker in zip(s.curvatures, MARKERS, strict=False):
        for j, (B, shade) in enumerate(zip(s.batch_sizes, np.linspace(0, 1, len(s.batch_sizes)), strict=True)):
            colour = theme.batch_sizes(shade)
            heat = np.array(s.rates) / B
            _points(axes, heat, found.variance.at(curvature=h)[:, :, j], colour, marker, f"h = {h:g}, B = {B}")
            rates = np.geomspace(min(s.rates), max(s.rates), 60)
            axes.plot(rates / B, [stationary_variance(r, s.noise**2 / B, h) for r in rates], color=colour, lw=0.9)
    logarithmic(axes, TEMPERATURE, "variance of the parameter", "Quadratic: lines are theory")
    axes.legend(fontsize=7.5, labelspacing=0.25, loc="upper left")


def _excess(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    heat = temperatures(found)
    sizes = s.well_batch_sizes
    for j, (B, shade, marker) in enumerate(zip(sizes, np.linspace(0, 1, len(sizes)), MARKERS, strict=False)):
        _points(axes, heat[:, j], found.excess.values[:, :, j], theme.batch_sizes(shade), marker, f"B = {B}")
        rates = np.geomspace(min(s.well_rates), max(s.well_rates), 60)
        foretold = [expected_excess(found.curvatures, found.noise, rate, B) for rate in rates]
        axes.plot(rates / B, foretold, color=theme.batch_sizes(shade), lw=0.9)
    line = np.array([heat.min(), heat.max()])
    axes.plot(line, line * found.trace / 4, color=theme.ink, lw=1, linestyle=":", label="(eta/B) tr Sigma / 4")
    logarithmic(axes, TEMPERATURE, "excess training loss (nats)", "Softmax regression: lines are theory")
    axes.legend(fontsize=8, labelspacing=0.3)


def _colours(theme: Theme) -> dict[tuple[bool, bool], tuple[str, str]]:
    """Colour and line of each way to anneal."""
    return {
        (False, False): (theme.reference, "-"),
        (True, False): (theme.baselines[0], "-"),
        (True, True): (theme.ours[0], "--"),
        (False, True): (theme.baselines[2], "--"),
    }


def _curves(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    gaps = [found.apart((False, False), (True, False), i).mean() for i in range(len(s.lr_multipliers))]
    shown = int(np.argmax(gaps))
    examples = np.array(found.examples)
    for way, (colour, line) in _colours(theme).items():
        curves = found.curve.at(decays=way[0], grows=way[1])[:, shown]
        steps = f"{WAYS[way]} ({found.steps[way]:,} steps)"
        axes.plot(examples, np.exp(np.log(curves).mean(axis=0)), color=colour, linestyle=line, lw=1.5, label=steps)
        range_band(axes, examples, curves, colour)
    for stage in range(1, s.stages):
        axes.axvline(stage * s.stage, color=theme.faint, lw=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("examples seen")
    axes.set_ylabel("training loss (nats)")
    plain_log_ticks(axes)
    axes.set_title(f"Annealing, {s.lr_multipliers[shown]:g} times the method's lr")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes.legend(fontsize=7.5, labelspacing=0.25)


def _apart(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    colours = _colours(theme)
    pairs = [
        ((True, False), (False, False), "lr falls: from constant", colours[(True, False)]),
        ((True, True), (True, False), "B grows: from lr falls", colours[(True, True)]),
        ((False, True), (False, False), "B grows, eta/B kept: from constant", colours[(False, True)]),
    ]
    for way, other, label, (colour, _) in pairs:
        gaps = np.stack([found.apart(way, other, i).mean(axis=1) for i in range(len(s.lr_multipliers))], axis=1)
        axes.plot(s.lr_multipliers, gaps.mean(axis=0), color=colour, marker="o", markersize=4, lw=1.3, label=label)
        range_band(axes, s.lr_multipliers, gaps, colour)
    title = "How far annealing moves curves"
    logarithmic(axes, "learning rate, times the method's own", "difference in ln(training loss)", title)
    headroom(axes, 0.4)
    axes.set_xticks(s.lr_multipliers, [f"{x:g}" for x in s.lr_multipliers])
    axes.legend(fontsize=7.5, labelspacing=0.25, loc="upper left")


def _bars(axes: Axes, names: list[str], values: list[Any], colours: list[str], label: str, title: str) -> None:
    """Means of values (S,), with each seed as a dot."""
    for i, (found, colour) in enumerate(zip(values, colours, strict=True)):
        axes.barh(i, found.mean(), color=colour, height=0.6, alpha=0.75)
        axes.plot(found, np.full(len(found), i), "o", color=axes.xaxis.label.get_color(), markersize=2.5, alpha=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title)


def _losses(axes: Axes, found: Analysis, theme: Theme) -> None:
    best = [found.tuned(i) for i in range(len(ENSEMBLES))]
    values = [found.tested.values[:, lr, i, 1] for i, lr in enumerate(best)]
    colours = [theme.ours[0], theme.ours[1], theme.baselines[0], theme.baselines[1]]
    names = [name.replace(", ", ",\n") for name in ENSEMBLES]
    _bars(axes, names, values, colours, "test loss (nats)", "Snapshots: test loss")


def _distances(axes: Axes, found: Analysis, theme: Theme) -> None:
    lr = found.tuned(0)
    names = ["along cycles", "along one run", "independent\nruns"]
    values = [found.distance.values[:, lr, i] for i in range(3)]
    colours = [theme.ours[0], theme.baselines[0], theme.reference]
    _bars(axes, names, values, colours, "distance in function space", "Snapshots: how different")
