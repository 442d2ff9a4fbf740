"""A chart as HTML and SVG: every combination of logarithmic and linear axes, and a legend with the final values.

Curves are stretched to whatever width there is, their strokes are not, and labels are text beside them: so a chart can
be read on a telephone. Colours are CSS variables, and follow the colour scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import product

import numpy as np

from experiments.estimate import Array
from experiments.pages.appearance import Appearance
from experiments.pages.axes import SCALES, Axis, Scale, axis
from experiments.pages.curves import Curve
from experiments.pages.html import CHART, unbroken

SIDE = 1000  # units of a drawing's width and height
OUTSIDE = 1000 * SIDE
MOST_BANDS = 8  # in sight at once: more of them would hide the lines
MARGIN = 0.05  # above and below the curves, of the height


@dataclass(frozen=True)
class Line:
    """key: what the same group has in all charts of a page."""

    key: str
    label: str
    curve: Curve
    appearance: Appearance


def chart(name: str, title: str, lines: Sequence[Line], scale: Scale, ceiling: float = np.inf) -> str:
    """scale: of the vertical axis at first. What lies above the ceiling is cut off."""
    values = np.concatenate([[*line.curve.low, *line.curve.high] for line in lines])
    plots = {
        (x, y): _plot(title, lines, across, up)
        for x, y in product(SCALES, SCALES)
        if (across := axis(np.concatenate([line.curve.examples for line in lines]), x)) is not None
        and (up := axis(np.minimum(values, ceiling), y, MARGIN)) is not None
    }
    legend = "\n".join(map(_entry, lines))
    crowded = " data-crowded" if len(lines) > MOST_BANDS else ""
    if not plots:
        drawn = '<p class="readout">Logged at one count of examples only: there is nothing to draw.</p>'
    else:
        first = min(plots, key=lambda axes: (axes[1] != scale, axes[0] != "log"))
        drawn = '<p class="readout" aria-hidden="true"></p>\n' + "\n".join(
            f'<div class="plot" data-x="{x}" data-y="{y}"{"" if (x, y) == first else " hidden"}>{plot}</div>'
            for (x, y), plot in plots.items()
        )
    return (
        f'{CHART} data-name="{escape(name)}" data-y="{scale}"{crowded}>\n'
        f'<figcaption>{escape(title)}</figcaption>\n{drawn}\n<ul class="legend">\n{legend}\n</ul>\n</figure>'
    )


def _plot(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    columns = "".join(f'<span style="left:{100 * place:.2f}%">{text}</span>' for place, text in x.ticks())
    rows = "".join(f'<span style="bottom:{100 * place:.2f}%">{text}</span>' for place, text in y.ticks())
    grid = "".join(f"M0 {SIDE * (1 - place):.0f}H{SIDE}" for place, _ in y.ticks())
    curves = "".join(_drawn(line, x, y) for line in lines)
    alternative = escape(
        f"{title} against examples seen, {len(lines)} curves; their final values are in the list below"
    )
    return (
        f'<div class="rows" aria-hidden="true">{rows}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{alternative}">'
        f'<path class="grid" d="{grid}"/>{curves}</svg>'
        f'<div class="columns" aria-hidden="true">{columns}</div>'
        '<div class="unit" aria-hidden="true">examples seen</div>'
    )


def _drawn(line: Line, x: Axis, y: Axis) -> str:
    curve = line.curve
    across = SIDE * x.places(curve.examples)
    # Far above the ceiling a coordinate would be no number to a browser.
    low, mean, high = (
        np.clip(SIDE * (1 - y.places(values)), -OUTSIDE, OUTSIDE) for values in (curve.low, curve.mean, curve.high)
    )
    # On a logarithmic axis a band that reaches down to zero goes to its edge.
    low = np.where(np.isfinite(high) & ~np.isfinite(low), SIDE, low)
    there = np.isfinite(across) & np.isfinite(mean)
    if not there.any():
        return ""
    path = _path(across[there], mean[there])
    band = ""
    if (curve.high > curve.low).any():
        outline = _path(
            np.concatenate([across[there], across[there][::-1]]), np.concatenate([high[there], low[there][::-1]])
        )
        band = f'<path class="band" d="{outline}Z"/>'
    return (
        f'<g class="curve" data-group="{line.key}" style="{line.appearance.style()}">'
        f'{band}<path class="line" d="{path}"/></g>'
    )


def _path(x: Array, y: Array) -> str:
    # One point alone has a length of its own, so that its round end is seen.
    points = [f"{a:.0f} {b:.0f}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def _entry(line: Line) -> str:
    curve = line.curve
    value = f"{curve.mean[-1]:.4g}"
    if curve.high[-1] > curve.low[-1]:
        value += f" ({curve.low[-1]:.4g} to {curve.high[-1]:.4g})"
    return (
        f'<li><button type="button" data-group="{line.key}" aria-pressed="false" style="{line.appearance.style()}">'
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path class="line" d="M1 4H27"/></svg>'
        f'<span class="name">{unbroken(line.label)}</span> <span class="value">{value}</span></button></li>'
    )
