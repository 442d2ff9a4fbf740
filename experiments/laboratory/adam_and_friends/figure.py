"""Training loss against steps and seconds, torch's and ours; steps and seconds to the target."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.drawing import bars
from experiments.estimate import Array
from experiments.laboratory.adam_and_friends.analysis import SHOWN, Analysis, median
from experiments.laboratory.adam_and_friends.race import METHODS, SIDES
from experiments.themes import Theme, canvas, plain_log_ticks


def caption(analysis: Analysis) -> str:
    settings = analysis.settings
    return (
        "Top: training loss against steps and against seconds, geometric mean over seeds; broad lines are torch's, "
        f"thin black ones ours on top of them; the dotted line is the target, {settings.target:g} nats. Bottom: steps "
        "and seconds to the target, hollow for torch's and filled for ours, medians with 95% intervals over "
        f"{len(settings.seeds)} seeds."
    )


def alternative(analysis: Analysis) -> str:
    numbers = "; ".join(
        f"{method.label} {median(analysis.of(analysis.reached, name)).text()} steps, "
        f"{median(analysis.of(analysis.seconds_reached, name)).text()} s"
        for name, method in METHODS.items()
    )
    return f"Training loss against steps and seconds for five methods. To the target with torch's: {numbers}."


def draw(analysis: Analysis, theme: Theme) -> Figure:
    colours = dict(zip(METHODS, (*theme.baselines[:4], theme.ours[0]), strict=True))
    with canvas(theme, 8.0, 6.0) as figure:
        rows: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1))
        above, below = rows
        panels = above.subplots(1, 2, sharey=True)
        seconds = np.median(analysis.seconds, axis=0)  # (methods, sides, looks)
        for i, name in enumerate(METHODS):
            for side in SHOWN:
                curve = np.exp(np.log(analysis.of(analysis.loss, name, side)).mean(axis=0))
                colour, width = (colours[name], 3.0) if side == "torch" else (theme.ink, 0.7)
                panels[0].plot(analysis.steps[1:], curve[1:], color=colour, linewidth=width)
                panels[1].plot(seconds[i, SIDES.index(side), 1:], curve[1:], color=colour, linewidth=width)
        for axes, label in zip(panels, ("steps", "seconds in steps"), strict=True):
            axes.axhline(analysis.settings.target, color=theme.faint, linestyle=":", linewidth=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(label)
            plain_log_ticks(axes)
        panels[0].set_ylabel("training loss (nats)")
        panels[0].set_title("Training loss against steps")
        panels[1].set_title("and against seconds")
        handles = [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()]
        panels[0].legend(
            [*handles, Line2D([], [], color=theme.ink, linewidth=0.7)],
            [*(method.label for method in METHODS.values()), "ours"],
            loc="lower left",
            fontsize=7.5,
        )
        counts, times = below.subplots(1, 2, sharey=True)
        _to_target(counts, analysis, analysis.reached, colours)
        _to_target(times, analysis, analysis.seconds_reached, colours)
        counts.set_xlabel("steps to the target")
        times.set_xlabel("seconds to the target")
        counts.set_yticks(range(len(METHODS)), [method.label for method in METHODS.values()])
        counts.invert_yaxis()
    return figure


def _to_target(axes: Axes, analysis: Analysis, values: Array, colours: dict[str, str]) -> None:
    for i, (name, colour) in enumerate(colours.items()):
        for side, offset, face in zip(SHOWN, (-0.15, 0.15), ("none", colour), strict=True):
            estimate = median(analysis.of(values, name, side))
            style: Any = {"marker": "o", "color": colour, "markerfacecolor": face, "markersize": 5}
            axes.errorbar([estimate.value], [i + offset], xerr=bars([estimate]), **style)
    axes.set_xscale("log")
    axes.grid(axis="x", linewidth=0.3)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 1.2)
    plain_log_ticks(axes)
