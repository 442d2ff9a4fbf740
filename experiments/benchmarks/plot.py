"""A run at a glance: time against memory of every contestant that is right, workload by workload, and the scales."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.benchmarks.contestants import is_ours
from experiments.benchmarks.report import Run
from experiments.benchmarks.workloads import WORKLOADS
from experiments.themes import LIGHT

COLUMNS = 4
# A colour for each library, of Okabe and Ito's palette; a marker for each statistic.
LIBRARIES = {
    "gradstats": "#0072b2",
    "BackPACK": "#e69f00",
    "Opacus": "#d55e00",
    "torch.func": "#cc79a7",
    "plain torch and loops": "#8c6d31",
}
MARKERS = {"second_moment": "o", "norms": "^", "variance": "s", "all": "P", "": "X"}


def library(title: str) -> str:
    return next((name for name in LIBRARIES if title.startswith(name)), "plain torch and loops")


def draw(run: Run) -> Figure:
    scales = list(dict.fromkeys(g.scale for g in run.growths))
    rows = -(-len(run.workloads) // COLUMNS) + bool(scales)
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8, "axes.titlesize": 8.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 2.6 * rows + 0.6), layout="constrained")
        panels: Any = figure.subplots(rows, COLUMNS, squeeze=False)
        places = list(panels.flat)
        for axes in places:
            axes.set_axis_off()
        for axes, workload in zip(places, run.workloads, strict=False):
            prices(axes, run, workload)
        for axes, scale in zip(panels[-1], scales, strict=False):
            growth(axes, run, scale)
        legend(figure)
    return figure


def prices(axes: Axes, run: Run, workload: str) -> None:
    axes.set_axis_on()
    for r in run.of_workload(workload):
        if r.error is not None or r.ratio is None or r.above is None or not r.statistic:
            continue
        mine = is_ours(r.contestant)
        colour = LIBRARIES[library(r.title)]
        axes.plot(
            r.ratio, r.above, MARKERS[r.statistic], color=colour, markersize=6 if mine else 5, zorder=3 if mine else 2
        )
    axes.axvline(1, color=LIGHT.faint, linewidth=0.8, linestyle=":")
    axes.axhline(1, color=LIGHT.faint, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=min(-0.5, axes.get_ylim()[0]))
    plain_numbers(axes)
    axes.set_title(WORKLOADS[workload].title)
    axes.set_xlabel("time / plain")
    axes.set_ylabel("memory above plain\n(parameters)")


def growth(axes: Axes, run: Run, scale: str) -> None:
    axes.set_axis_on()
    found = [g for g in run.growths if g.scale == scale]
    axes.plot(found[0].values, found[0].plain_ms, color=LIGHT.ink, label=f"plain, slope {found[0].plain_slope:.2f}")
    for g, line in zip(found, ("-", "--"), strict=False):
        label = f"{g.statistic.replace('_', ' ')}, {g.slope:.2f}"
        axes.plot(g.values, g.ms, line, color=LIBRARIES["gradstats"], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_numbers(axes)
    axes.set_xlabel(found[0].symbol)
    axes.set_ylabel("ms a step")
    axes.set_title(found[0].title)
    axes.legend(frameon=False, fontsize=7)


def plain_numbers(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Figure) -> None:
    colours = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in LIBRARIES.values()]
    shapes = {name: marker for name, marker in MARKERS.items() if name}
    markers = [Line2D([], [], color=LIGHT.ink, marker=marker, linestyle="") for marker in shapes.values()]
    names = [*LIBRARIES, *(name.replace("_", " ") for name in shapes)]
    figure.legend(colours + markers, names, loc="outside lower center", ncols=len(names), frameon=False)
