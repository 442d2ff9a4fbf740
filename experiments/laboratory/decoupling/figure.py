"""Heat maps of the final loss, a row a hyperparameter: torch's units on the left, units of examples on the right."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.laboratory.decoupling.analysis import AXES, Analysis, HeatMap
from experiments.themes import Theme, canvas

SIDES = {"torch": "In torch's units", "examples": "In units of examples"}
LR_LABELS = {"torch": "learning rate of a step", "examples": "learning rate of an example, lr0"}
TICKS = [k * 10.0**power for power in range(-4, 2) for k in (1, 1.5, 2, 3, 5, 7)]


def caption(analysis: Analysis) -> str:
    return (
        "Final training loss over the learning rate and another hyperparameter, geometric mean over "
        f"{len(analysis.settings.seeds)} seeds, one scale for all. Left: torch's optimizers; right: in units of "
        "examples. Points: the best learning rate, by a parabola around the lowest cell; "
        "bars are 95% intervals over seeds. Where the points stand one above the other, the learning rate "
        "need not be tuned again."
    )


def alternative(analysis: Analysis) -> str:
    told = (
        f"{AXES[axis].label}: the best learning rate moves over {pair['torch'].drift} octaves in torch's "
        f"units, over {pair['examples'].drift} in units of examples."
        for axis, pair in analysis.maps.items()
    )
    return f"{2 * len(AXES)} heat maps of the final training loss. {' '.join(told)}"


def draw(analysis: Analysis, theme: Theme) -> Figure:
    maps = analysis.maps
    losses = np.exp(np.concatenate([found.log_loss.ravel() for pair in maps.values() for found in pair.values()]))
    # Above the median all is far from the optimum, and need not be told apart.
    scale = LogNorm(float(losses.min()), float(np.median(losses)), clip=True)
    with canvas(theme, 8.0, 1.2 + 2.0 * len(maps)) as figure:
        rows: Any = figure.subplots(len(maps), 2, squeeze=False)
        for row, (axis, pair) in zip(rows, maps.items(), strict=True):
            for axes, (units, found) in zip(row, pair.items(), strict=True):
                mesh = _map(axes, found, scale, theme)
                axes.set_title(f"{SIDES[units]}: drift {found.drift.text()} octaves")
                axes.set_xlabel(LR_LABELS[units])
            row[0].set_ylabel(AXES[axis].label.replace(", ", ",\n"))
        bar = figure.colorbar(mesh, ax=rows, orientation="horizontal", fraction=0.02, aspect=50, extend="max")
        bar.set_label("final training loss (nats)")
        bar.set_ticks([t for t in TICKS if losses.min() <= t <= np.median(losses)])
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.xaxis.set_minor_locator(NullLocator())
    return figure


def _map(axes: Axes, found: HeatMap, scale: LogNorm, theme: Theme) -> QuadMesh:
    rows = np.arange(len(found.values))
    octaves = np.log2(found.lrs)
    mesh = axes.pcolormesh(
        octaves, rows, np.exp(found.log_loss), norm=scale, cmap=theme.batch_sizes.reversed(), shading="nearest"
    )
    best, low, high = (np.log2([getattr(lr, name) for lr in found.best_lr]) for name in ("value", "low", "high"))
    for colour, width in ((theme.background, 4.0), (theme.ours[0], 2.0)):
        axes.plot(best, rows, color=colour, linewidth=width, marker="o", markersize=2 * width)
    for colour, width in ((theme.background, 4.0), (theme.ours[0], 2.0)):
        axes.hlines(rows, low, high, color=colour, linewidth=width)
    axes.set_yticks(rows, [f"{value:g}" for value in found.values])
    powers = range(int(np.floor(np.log10(found.lrs[0]))), int(np.ceil(np.log10(found.lrs[-1]))))
    ticks = [k * 10.0**power for power in powers for k in (1, 3)]
    shown = [tick for tick in ticks if found.lrs[0] <= tick <= found.lrs[-1]]
    axes.set_xticks(np.log2(shown), [f"{tick:g}" for tick in shown])
    return mesh
