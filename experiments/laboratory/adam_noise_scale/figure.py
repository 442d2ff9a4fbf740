"""The figure of adam_noise_scale: tuned learning rates over the batch size, with the law, and B_noise along the run."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import across_batch_sizes, bars, headroom, interval_band
from experiments.laboratory.adam_noise_scale.analysis import (
    HESSIAN,
    LAWFUL,
    OURS,
    SIMPLE,
    Analysis,
)
from experiments.laboratory.adam_noise_scale.measure import SIZES
from experiments.laboratory.knee import surge_law
from experiments.themes import Theme, canvas, plain_log_ticks

COLUMNS = (*LAWFUL, OURS)


def caption(found: Analysis) -> str:
    s = found.settings
    return (
        "Top: the tuned learning rate over the batch size; of R = 1, that of an example times B0. Solid: the law, "
        "fitted to them; dotted: the learning rate that mean, variance and Hessian tell for a step by the sign, at the "
        "height of the tuned ones. Vertical lines: B_noise, fitted (dashed), measured with the Hessian and without it. "
        f"Bottom: along the run of B = {s.followed_batch_size}, B_noise without the Hessian, over the training set and "
        f"from the batches as they come. Intervals of 95% over {len(s.seeds)} seeds."
    )


def alternative(found: Analysis) -> str:
    told = "; ".join(
        f"{label}: " + ", ".join(f"{found.lr(label, B)} at B = {B}" for B in found.settings.batch_sizes)
        for label in COLUMNS
    )
    return f"Tuned learning rates over the batch size, and B_noise along the run. {told}."


def draw(found: Analysis, theme: Theme) -> Figure:
    colours = dict(zip(COLUMNS, (theme.reference, theme.baselines[0], theme.ours[0]), strict=True))
    with canvas(theme, 11.0, 6.6, len(found.settings.seeds)) as figure:
        rows: Any = figure.subfigures(2, 1)
        above: Any = rows[0].subplots(1, len(COLUMNS))
        for axes, label in zip(above, COLUMNS, strict=True):
            _rates(axes, found, label, colours[label], theme)
        above[0].set_ylabel("tuned learning rate")
        below: Any = rows[1].subplots(1, len(LAWFUL))
        for axes, label in zip(below, LAWFUL, strict=True):
            _along(axes, found, label, theme)
        below[0].set_ylabel("pi/2 sum sigma^2 / sum mu^2 (examples)")
    return figure


def _rates(axes: Axes, found: Analysis, label: str, colour: Any, theme: Theme) -> None:
    sizes = found.settings.batch_sizes
    rates = [found.lr(label, B) for B in sizes]
    values = np.array([rate.value for rate in rates])
    axes.errorbar(sizes, values, yerr=bars(rates), color=colour, marker="o", markersize=4, capsize=2, linestyle="none")
    if label in LAWFUL:
        knee = found.knee(label, found.contest.everyone)
        fine = np.geomspace(sizes[0], sizes[-1], 80)
        if np.isfinite(knee.size):
            law = surge_law(fine / knee.size)
            height = np.log(values).mean() - surge_law(np.array(sizes) / knee.size).mean()
            axes.plot(fine, np.exp(height + law), color=colour, linewidth=1.3)
        _told(axes, found, label, values, theme)
        marks = [(knee.size, colour, "--", "fitted")]
        for kind, shade in ((HESSIAN, theme.baselines[1]), (SIMPLE, theme.ours[1])):
            marks.append((found.measured(label, kind, found.contest.everyone), shade, ":", kind))
        for size, shade, style, name in marks:
            if sizes[0] / 2 < size < 2 * sizes[-1]:
                axes.axvline(size, color=shade, linewidth=1.1, linestyle=style, label=f"B_noise {name}")
    axes.set_yscale("log")
    headroom(axes, 0.45 if label in LAWFUL else 0.0)
    across_batch_sizes(axes, sizes)
    if label in LAWFUL:
        axes.legend(fontsize=7, labelspacing=0.25, loc="upper left")
    axes.set_title(f"{label}: tuned lr")


def _told(axes: Axes, found: Analysis, label: str, values: Any, theme: Theme) -> None:
    """The learning rate of a step by the sign, at the height of the tuned ones."""
    of, sizes = found.followed[label], found.settings.batch_sizes
    gain, curvature = (of[part].sum(axis=(0, 1)) for part in ("gain", "curvature"))
    if not ((gain > 0) & (curvature > 0)).all():
        return
    told = np.interp(np.log(sizes), np.log(SIZES), np.log(gain / curvature))
    height = np.log(values).mean() - told.mean()
    axes.plot(sizes, np.exp(told + height), color=theme.faint, linewidth=1.2, linestyle=":", label="told for the sign")


def _along(axes: Axes, found: Analysis, label: str, theme: Theme) -> None:
    of = found.followed[label]
    examples = of["examples"][0]
    exact = np.log(np.pi / 2 * of["sigma2"] / of["mu2"])
    axes.plot(examples, np.exp(exact.mean(axis=0)), color=theme.reference, linewidth=1.4, label="over the training set")
    interval_band(axes, examples, exact, theme.reference)
    online = np.pi / 2 * of["online_sigma2"].mean(axis=0) / of["online_mu2"].mean(axis=0)
    above = online > 0
    axes.plot(examples[above], online[above], "o", color=theme.ours[0], markersize=4, label="online, from batches")
    axes.set_yscale("log")
    headroom(axes, 0.3)
    plain_log_ticks(axes)
    axes.set_xlabel("examples seen")
    axes.set_title(f"{label}: along the run")
    axes.legend(fontsize=7.5, labelspacing=0.25, loc="upper left")
