"""Learning curves of the tuned variants, and their final loss along the learning rate; without warm-up, and with."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.drawing import interval_band
from experiments.estimate import Array
from experiments.laboratory.bias_correction.analysis import ROW, Analysis, Goal
from experiments.laboratory.bias_correction.moments import VARIANTS
from experiments.themes import Theme, canvas, plain_log_ticks

Line = Literal["-", "--"]


def caption(analysis: Analysis) -> str:
    return (
        "Training loss on the digits, each variant at the learning rate that is best for its final loss, "
        f"geometric mean over {len(analysis.settings.seeds)} seeds with 95% intervals. Top: without warm-up; "
        "with the best of the warm-ups. Bottom: final loss along the learning rate."
    )


def alternative(analysis: Analysis) -> str:
    goal = analysis.goals[0]
    losses = "; ".join(f"{variant.label} {analysis.loss(name, goal)}" for name, variant in VARIANTS.items())
    return f"Learning curves of all variants, and their final loss along the learning rate. {goal.label}: {losses}."


def draw(analysis: Analysis, theme: Theme) -> Figure:
    plain, warmed = analysis.goals[:2]
    with canvas(theme, 8.0, 6.4) as figure:
        panels: Any = figure.subplots(2, 2, sharey="row")
        for column, (goal, title) in enumerate(((plain, "No warm-up"), (warmed, "Warm-up tuned"))):
            above, below = panels[:, column]
            for name, (colour, line, marker) in appearance(theme).items():
                _curve(above, analysis, name, goal, colour, line)
                _along_lr(below, analysis, name, goal, colour, line, marker)
            above.set_title(f"{title}: learning curves")
            above.set_xlabel("examples seen")
            below.set_title(f"{title}: along the learning rate")
            below.set_xlabel("learning rate (RMSProp's: torch's over 1 - beta1)")
            for axes in (above, below):
                axes.set_xscale("log")
                axes.set_yscale("log")
        panels[0, 0].set_ylabel("training loss (nats)")
        panels[1, 0].set_ylabel("final training loss (nats)")
        for axes in panels.flat:
            plain_log_ticks(axes)
        figure.legend(
            [
                Line2D([], [], color=c, linestyle=line, marker=m, markersize=5)
                for c, line, m in appearance(theme).values()
            ],
            [VARIANTS[name].label for name in appearance(theme)],
            loc="outside lower center",
            ncols=3,
        )
    return figure


def _curve(axes: Axes, analysis: Analysis, name: str, goal: Goal, colour: str, line: Line) -> None:
    warmup, lr = analysis.chosen(name, goal)
    curves: Array = analysis.log_loss[:, ROW[name], warmup, lr]  # (S, T)
    axes.plot(analysis.counts, np.exp(curves.mean(0)), color=colour, linestyle=line, linewidth=1.4)
    interval_band(axes, analysis.counts, curves, colour)


def _along_lr(axes: Axes, analysis: Analysis, name: str, goal: Goal, colour: str, line: Line, marker: str) -> None:
    """At each learning rate the best of the warm-ups."""
    losses = np.exp(analysis.at(goal)[:, ROW[name]].mean(0).min(0))
    axes.plot(analysis.lrs, losses, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.2)


def appearance(theme: Theme) -> dict[str, tuple[str, Line, str]]:
    """Colour, line and marker of each variant: Adam's lines are drawn through, RMSProp's are dashed."""
    return {
        "adam": (theme.ours[0], "-", "o"),
        "adam_first": (theme.baselines[3], "-", "^"),
        "adam_second": (theme.baselines[2], "-", "v"),
        "adam_none": (theme.ours[1], "-", "s"),
        "rmsprop": (theme.baselines[1], "--", "s"),
        "rmsprop_both": (theme.baselines[0], "--", "o"),
    }
