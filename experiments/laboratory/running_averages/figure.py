"""One draw with its averages, and noise against lag along horizons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import bars
from experiments.estimate import Array, Estimate, over_seeds
from experiments.laboratory.running_averages.analysis import LABELS, Analysis, of
from experiments.laboratory.running_averages.smoothing import AVERAGES, PHASES, SIGNALS
from experiments.themes import Theme, canvas, plain_log_ticks

# Lines that coincide are told apart by their widths: the widest is drawn first, and the broken one last.
WIDTHS = {"mean": 1.3, "ewma": 4.5, "debiased_ewma": 2.8, "window": 1.6, "slides": 1.4}
STYLES = {"slides": "--"}


def caption(analysis: Analysis) -> str:
    settings = analysis.settings
    return (
        f"Top: one draw (dots: the data, dotted line: the signal) and averages of horizon N = {settings.shown}. "
        "Bottom: what each leaves of the noise against its lag behind the cosine, one point a horizon (N = "
        f"{', '.join(map(str, settings.horizons))}, longer ones to the left), settled and in the first N examples; "
        f"lower and further left is better. Means over {len(settings.seeds)} seeds of {settings.draws} draws; "
        "vertical lines are 95% intervals over seeds, where they are larger than a point; lags that these do not tell "
        "from zero are left out. EWMA from zero, EWMA debiased and min(t, N) mean coincide once settled."
    )


def alternative(analysis: Analysis) -> str:
    settings, tracking, noise = analysis.settings, analysis.tracking, analysis.noise
    at = settings.horizons.index(settings.shown)
    numbers = "; ".join(
        f"{LABELS[kind]}: noise {of(noise, kind, 'cosine', 'settled')[:, at].mean():.2g}, "
        f"lag {of(tracking, kind, 'cosine', 'settled')[:, at].mean():.2g}"
        for kind in AVERAGES
    )
    return f"Averages of noisy data, and noise against lag along horizons. Settled, at N = {settings.shown}: {numbers}."


def draw(analysis: Analysis, theme: Theme) -> Figure:
    colours = {
        "mean": theme.reference,
        "ewma": theme.baselines[0],
        "debiased_ewma": theme.ours[0],
        "slides": theme.ours[1],
        "window": theme.baselines[1],
    }
    with canvas(theme, 8.0, 6.2) as figure:
        rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
        above, below = rows
        for axes, signal, title in zip(
            above.subplots(1, 2),
            SIGNALS,
            ("An offset with noise", f"A cosine of period {analysis.settings.period:,} with noise"),
            strict=True,
        ):
            _trace(axes, analysis.shown[signal], colours, theme)
            axes.set_title(title)
        panels = below.subplots(1, 2, sharey=True)
        for axes, phase, title in zip(
            panels, reversed(PHASES), ("Once settled", "In the first N examples"), strict=True
        ):
            _noise_against_lag(axes, analysis.tracking, analysis.noise, PHASES.index(phase), colours)
            axes.set_title(title)
        panels[0].set_ylabel("squared lag behind the cosine")
        handles = [
            panels[1].plot([], [], STYLES.get(kind, "-"), color=colours[kind], linewidth=WIDTHS[kind])[0]
            for kind in AVERAGES
        ]
        figure.legend(handles, [LABELS[kind] for kind in AVERAGES], loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _trace(axes: Axes, shown: Mapping[str, Any], colours: Mapping[str, str], theme: Theme) -> None:
    t = shown["examples"]
    axes.plot(t, shown["data"], ".", color=theme.faint, markersize=2.5, alpha=0.6, zorder=1)
    for kind in WIDTHS:
        values = shown["averages"][AVERAGES.index(kind)]
        axes.plot(t, values, color=colours[kind], linewidth=WIDTHS[kind], linestyle=STYLES.get(kind, "-"), zorder=2)
    axes.plot(t, shown["signal"], ":", color=theme.ink, linewidth=1.2, zorder=3)
    axes.set_xlabel("examples seen t")
    axes.set_ylabel("value")
    drawn = [value for values in [*shown["averages"], shown["signal"]] for value in values]
    axes.set_ylim(min(drawn) - 0.1, max(drawn) + 0.1)


def _noise_against_lag(axes: Axes, tracking: Array, noise: Array, phase: int, colours: Mapping[str, str]) -> None:
    cosine = SIGNALS.index("cosine")
    for kind in WIDTHS:
        i = AVERAGES.index(kind)
        horizons = slice(-1, None) if kind == "mean" else slice(None)  # the simple mean has none: one point
        x, y = (
            [over_seeds(values[:, h, i, cosine, phase]) for h in range(values.shape[1])][horizons]
            for values in (noise, tracking)
        )
        # On a logarithmic axis what might be zero would be most of the picture.
        y = [Estimate(np.nan, np.nan, np.nan) if e.low <= e.value / 10 else e for e in y]
        axes.errorbar(
            [e.value for e in x],
            [e.value for e in y],
            yerr=bars(y),
            color=colours[kind],
            marker="o",
            markersize=2.5 + WIDTHS[kind],
            linewidth=WIDTHS[kind],
            linestyle=STYLES.get(kind, "-"),
            elinewidth=1,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("share of the noise that is left")
    plain_log_ticks(axes)
