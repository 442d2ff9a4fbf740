"""The headline figure: learning curves over batch sizes, score against final loss, transfer regret."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.invariance import Analysis, best_baseline


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; methods are Okabe and Ito's palette, told apart by colour-blind readers too."""

    background: str
    ink: str
    faint: str
    batch_sizes: Colormap
    reference: str
    ours: tuple[str, ...]
    baselines: tuple[str, ...]


def _part_of_viridis(start: float, stop: float) -> Colormap:
    # The ends of viridis disappear in a dark and in a white background.
    return LinearSegmentedColormap.from_list("viridis", matplotlib.colormaps["viridis"](np.linspace(start, stop, 64)))


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    faint="#8b939c",
    batch_sizes=_part_of_viridis(0.0, 0.88),
    reference="#1f2328",
    ours=("#0072b2", "#56b4e9"),
    baselines=("#e69f00", "#d55e00", "#cc79a7", "#009e73", "#8c6d31"),
)
DARK = Theme(
    background="#15191e",
    ink="#e6e9ed",
    faint="#7d8590",
    batch_sizes=_part_of_viridis(0.25, 1.0),
    reference="#e6e9ed",
    ours=("#4aa8ff", "#a5d8ff"),
    baselines=("#f0b429", "#ff7b54", "#e59bc4", "#3ecf9b", "#c9a66b"),
)
# Seven markers to five colours, three to two: many more methods than a legend holds until a pair comes again.
MARKERS_OF_OURS = ("o", "h", "p")
MARKERS_OF_BASELINES = ("s", "^", "v", "D", "P", "<", ">")


def draw(analysis: Analysis, theme: Theme = LIGHT) -> Figure:
    """Two rows: training loss against examples for three methods; score and regret of all methods."""
    style: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": 8.5,
        "font.size": 8.5,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 6.0), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.09))
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


def image(figure: Figure, kind: str) -> bytes:
    """The file contents of a figure as "png" (at 200 dots per inch) or "svg"."""
    buffer = io.BytesIO()
    # With a fixed salt and no date the same records give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "gradstats"}):
        figure.savefig(buffer, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


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
    _plain_log_ticks(axes)


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
        f"(dotted: that of {analysis.reference_label}, and twice that)"
    )
    axes.set_ylabel("score (0 is invariant)")
    axes.set_title("Score along the lr grid")
    _plain_log_ticks(axes)


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
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    # Regrets span orders of magnitude and may be negative: linear up to the smallest typical one.
    threshold = 10 ** np.floor(np.log10(np.median(np.abs(point.regret)) + 1e-6))
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("batch size B")
    axes.set_ylabel(f"loss minus that of\n{analysis.reference_label}, tuned at B")
    axes.set_title("Transfer regret")


def _method_legend(axes: Axes, analysis: Analysis, theme: Theme) -> None:
    axes.set_axis_off()
    appearance = _appearance(analysis, theme)
    order = [*analysis.ours, *analysis.baselines]
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
    """Colour and marker of each method."""
    others = [m for m in analysis.baselines if m != analysis.reference]
    table = {analysis.reference: (theme.reference, "X")}
    of_ours = cycle((colour, marker) for marker, colour in product(MARKERS_OF_OURS, theme.ours))
    of_baselines = zip(cycle(theme.baselines), cycle(MARKERS_OF_BASELINES), strict=True)
    table |= dict(zip(analysis.ours, of_ours, strict=False))
    table |= dict(zip(others, of_baselines, strict=False))
    return [table[m] for m in range(len(analysis.grid.methods))]


def _plain_log_ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade where an axis spans less than two decades, else the decades."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
