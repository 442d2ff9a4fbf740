"""The headline figure: learning curves over batch sizes, score against final loss, transfer regret."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.drawing import across_batch_sizes
from experiments.estimate import listed
from experiments.invariance.analysis import Analysis, best_baseline
from experiments.themes import LIGHT, Theme, canvas, plain_log_ticks

# Seven markers to five colours, three to two: many more methods than a legend holds until a pair comes again.
MARKERS_OF_OURS = ("o", "*", "d")
MARKERS_OF_BASELINES = ("s", "^", "v", "D", "P", "<", ">")


def draw(analysis: Analysis, theme: Theme = LIGHT) -> Figure:
    """Two rows: training loss against examples for three methods; score and regret of all methods."""
    with canvas(theme, 8.0, 6.0) as figure:
        rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        curves, below = rows
        shown = list(dict.fromkeys([analysis.reference, best_baseline(analysis), analysis.ours[0]]))
        curves.suptitle(
            f"Training loss, with the learning rate tuned at B = {analysis.comparison.tuning_batch_size}",
            x=0.008,
            ha="left",
            fontsize=9,
        )
        panels = curves.subplots(1, len(shown), sharex=True, sharey=True)
        for axes, method in zip(panels, shown, strict=True):
            _learning_curves(axes, analysis, method, theme)
        panels[0].set_ylabel("training loss (nats)")
        _batch_size_legend(panels[0], analysis, theme)
        score, regret, legend = below.subplots(1, 3, width_ratios=(1.25, 1.25, 0.8))
        _score_against_loss(score, analysis, theme)
        _regret_over_batch_size(regret, analysis, theme)
        _method_legend(legend, analysis, theme)
    return figure


def _learning_curves(axes: Axes, analysis: Analysis, method: int, theme: Theme) -> None:
    grid = analysis.grid
    late = grid.examples > 0
    loss = np.exp(np.log(grid.train_loss[method, analysis.tuned[method]]).mean(axis=1))  # (B, T)
    for column, colour in enumerate(_batch_size_colours(analysis, theme)):
        axes.plot(grid.examples[late], loss[column, late], color=colour, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("examples seen")
    axes.set_title(grid.labels[method])
    axes.annotate(
        f"score {analysis.point.score[method]:#.2g}",
        (1, 1),
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=theme.ink,
    )
    plain_log_ticks(axes)


def _batch_size_colours(analysis: Analysis, theme: Theme) -> list[tuple[float, float, float, float]]:
    return [theme.batch_sizes(x) for x in np.linspace(0, 1, len(analysis.grid.batch_sizes))]


def _batch_size_legend(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    colours = _batch_size_colours(analysis, theme)
    axes.legend(
        [Line2D([], [], color=colour, linewidth=2) for colour in colours],
        [str(size) for size in analysis.grid.batch_sizes],
        title="batch size",
        title_fontsize=8,
        fontsize=8,
        loc="lower left",
        handlelength=1.2,
        labelspacing=0.25,
    )


def _score_against_loss(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    point = analysis.point
    for method, (colour, marker) in enumerate(_appearance(analysis, theme)):
        loss, score, tuned = (point.curve_loss[method], point.curve_score[method], analysis.tuned[method])
        front = 3 if method in analysis.ours else 2
        axes.plot(loss, score, color=colour, marker=marker, markersize=3, linewidth=1.2, zorder=front)
        axes.plot(loss[tuned], score[tuned], color=colour, marker=marker, markersize=7.5, zorder=front)
    for target in point.targets:
        axes.axvline(target, color=theme.faint, linewidth=0.8, linestyle=":", zorder=1)
    floor = analysis.seed_floor[analysis.ours[0]]
    if np.isfinite(floor):
        axes.axhline(floor, color=theme.faint, linewidth=0.8, linestyle="--", zorder=1)
        axes.annotate(
            "between seeds",
            (1, floor),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            color=theme.faint,
            fontsize=7.5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(
        f"final training loss at B = {analysis.comparison.tuning_batch_size}\n"
        f"(dotted: {listed(analysis.comparison.loss_targets)} times that of "
        f"{analysis.reference_label})"
    )
    axes.set_ylabel("score (0 is invariant)")
    axes.set_title("Score along the lr grid")
    plain_log_ticks(axes)


def _regret_over_batch_size(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    point, sizes = analysis.point, analysis.grid.batch_sizes
    for method, (colour, marker) in enumerate(_appearance(analysis, theme)):
        front = 3 if method in analysis.ours else 2
        axes.plot(
            sizes,
            point.regret[method],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            zorder=front,
            clip_on=False,
        )
    axes.axhline(0, color=theme.faint, linewidth=0.8, zorder=1)
    across_batch_sizes(axes, sizes)
    # Regrets span orders of magnitude and may be negative: linear up to the smallest typical one.
    threshold = 10 ** np.floor(np.log10(np.median(np.abs(point.regret)) + 1e-6))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"loss minus that of\n{analysis.reference_label}, tuned at B")
    axes.set_title("Transfer regret")


def _method_legend(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    axes.set_axis_off()
    appearance = _appearance(analysis, theme)
    order = [*analysis.ours, *analysis.baselines, *analysis.kin]
    axes.legend(
        [Line2D([], [], color=appearance[m][0], marker=appearance[m][1], markersize=5, linewidth=1.2) for m in order],
        [analysis.grid.labels[m] for m in order],
        loc="upper left",
        borderaxespad=0,
        fontsize=8,
        handlelength=1.8,
        labelspacing=0.7,
    )


def _appearance(analysis: Analysis, theme: Theme) -> list[tuple[str, str]]:
    return appearances(len(analysis.grid.methods), analysis.ours, analysis.reference, theme)


def appearances(methods: int, ours: Sequence[int], reference: int, theme: Theme) -> list[tuple[str, str]]:
    """Colour and marker of each method."""
    others = [m for m in range(methods) if m not in ours and m != reference]
    table = {reference: (theme.reference, "X")}
    of_ours = cycle((colour, marker) for marker, colour in product(MARKERS_OF_OURS, theme.ours))
    of_baselines = zip(cycle(theme.baselines), cycle(MARKERS_OF_BASELINES), strict=True)
    table |= dict(zip(ours, of_ours, strict=False))
    table |= dict(zip(others, of_baselines, strict=False))
    return [table[m] for m in range(methods)]
