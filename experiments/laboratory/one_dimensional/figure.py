"""The figure of one_dimensional: gradients at the minimum, errors along schedules, constant learning rates."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import across_batch_sizes, logarithmic, range_band
from experiments.laboratory.one_dimensional.analysis import EDGE, Analysis, name
from experiments.laboratory.one_dimensional.runs import counts
from experiments.themes import Theme, canvas

SHOWN_STEPS = 24


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        "Top left: the gradient of a batch where that of the true loss is zero. Top right: the error against steps for "
        f"learning rates {s.scale:g} / t^p at B = {s.batch_sizes[0]}; lines that go on downwards converge. Bottom "
        "left: constant learning rates without noise. Bottom right: at the edge, eta = 2, noise turns the cycle of two "
        "steps into a random walk. Bands are the range over "
        f"{len(s.seeds)} seeds of {s.repetitions} runs each; dotted lines are closed forms, with nothing fitted."
    )


def alternative(found: Analysis) -> str:
    B = found.settings.batch_sizes[0]
    ends = "; ".join(f"{name(found, p)}: {found.error(p, B).text()}" for p in found.settings.powers)
    return f"Four charts of measurements on their closed forms. Errors at the end, at B = {B}: {ends}."


def draw(found: Analysis, theme: Theme) -> Figure:
    with canvas(theme, 8.0, 6.4) as figure:
        panels: Any = figure.subplots(2, 2)
        _gradient(panels[0, 0], found, theme)
        _schedules(panels[0, 1], found, theme)
        _constant(panels[1, 0], found, theme)
        _walk(panels[1, 1], found, theme)
    return figure


def _band(axes: Axes, x: Any, squares: Any, expected: Any, colour: Any, label: str) -> None:
    """The root of mean squares (S, T), and of what they should be (T,)."""
    range_band(axes, x, np.sqrt(squares), colour, alpha=0.35)
    axes.plot(x, np.sqrt(squares.mean(axis=0)), color=colour, linewidth=1.4, label=label)
    axes.plot(x, np.sqrt(expected), color=axes.xaxis.label.get_color(), linewidth=0.9, linestyle=":")


def _gradient(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    sizes = np.array(s.batch_sizes)
    axes.plot(sizes, s.noise / np.sqrt(sizes), color=theme.ink, linestyle=":", linewidth=1.2, label="sigma / sqrt(B)")
    rms = np.sqrt(found.gradients.values)  # (S, B)
    middle = rms.mean(axis=0)
    axes.errorbar(
        sizes,
        middle,
        yerr=[middle - rms.min(axis=0), rms.max(axis=0) - middle],
        color=theme.ours[0],
        fmt="o",
        markersize=5,
        capsize=3,
        label="measured",
    )
    logarithmic(axes, "", "gradient at the minimum\n(root mean square)", "Not zero for a finite batch")
    across_batch_sizes(axes, s.batch_sizes)
    axes.legend(fontsize=8)


def _schedules(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    B, steps = s.batch_sizes[0], counts(s.steps)
    for power, colour in zip(s.powers, [*theme.baselines, *theme.ours], strict=False):
        squares = found.schedules.at(power=power, batch_size=B)[..., 1]
        _band(axes, steps, squares, found.expected(power, B)[1], colour, name(found, power))
    logarithmic(axes, "steps t", "error (root mean square)", f"Decaying learning rates, B = {B}")
    axes.legend(fontsize=8, loc="lower left", labelspacing=0.3)


def _constant(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    for rate, colour in zip(s.rates, [*theme.ours, *theme.baselines], strict=False):
        errors = found.exact.at(rate=rate)[0, : SHOWN_STEPS + 1]
        edge = rate == EDGE
        axes.plot(
            errors,
            color=theme.ink if edge else colour,
            linewidth=1.6 if edge else 1.1,
            marker="o",
            markersize=2.5,
            label=f"eta = {rate:g}",
        )
    axes.set_ylim(-2 * s.start, 3.2 * s.start)  # room for the legend above the cycle
    axes.set_xlabel("steps t")
    axes.set_ylabel("error")
    axes.set_title("Constant learning rates, no noise")
    axes.legend(fontsize=8, ncols=2, loc="upper left", labelspacing=0.3)


def _walk(axes: Axes, found: Analysis, theme: Theme) -> None:
    s = found.settings
    steps = counts(s.rate_steps)
    for B, shade in zip(s.batch_sizes, np.linspace(0, 1, len(s.batch_sizes)), strict=True):
        squares = found.walk.at(batch_size=B)[..., 1]
        _band(axes, steps, squares, found.expected_walk(B)[1], theme.batch_sizes(shade), f"B = {B}")
    axes.axhline(s.start, color=theme.faint, linewidth=1, linestyle="--", label="the cycle without noise")
    logarithmic(axes, "steps t", "error (root mean square)", "eta = 2 with noise: a walk")
    axes.legend(fontsize=8, loc="upper left", labelspacing=0.3)
