"""Heat maps: the final values of groups that differ in exactly two numbers, on a whole grid of them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.colors import to_hex

from experiments.estimate import Array, Estimate
from experiments.pages.groups import Collection, Group, is_numeric, label, named, shown
from experiments.pages.html import paragraph, scrolling
from experiments.themes import LIGHT

READ_EQUALLY = 0.18  # relative luminance of a colour on which black and white have the same contrast


@dataclass(frozen=True)
class HeatMap:
    """down and across: the two keys, whose values ascend; panel: the values of what else tells groups apart."""

    panel: str
    down: str
    across: str
    cells: list[list[Group]]


def heat_maps(collection: Collection) -> list[HeatMap]:
    """One for each value of what else tells the groups apart, as the optimizer, if it has runs in every cell."""
    numbers = [key for key in collection.telling if is_numeric(collection.groups, key)]
    if len(numbers) != 2:
        return []
    down, across = sorted(numbers, key=lambda key: key == "train.batch_size")
    others = [key for key in collection.telling if key not in numbers]
    panels: dict[str, list[Group]] = {}
    for group in collection.groups:
        panels.setdefault(label(group.settings, others), []).append(group)
    found = []
    for panel, groups in panels.items():
        rows, columns = (sorted({group.settings[key] for group in groups}) for key in (down, across))
        at = {(group.settings[down], group.settings[across]): group for group in groups}
        if min(len(rows), len(columns)) > 1 and len(at) == len(rows) * len(columns):
            found.append(HeatMap(panel, down, across, [[at[row, column] for column in columns] for row in rows]))
    return found


def drawn(heat_map: HeatMap, metric: str, name: str) -> str:
    """A table with coloured cells: bright is good. The best is framed."""
    values = np.array([[group.mean(metric) for group in row] for row in heat_map.cells])
    # Of losses the logarithm: a run that diverged would leave one colour to all the others.
    higher_is_better = metric.startswith("accuracy/")
    goodness = values if higher_is_better else -np.log(np.maximum(values, np.finfo(float).tiny))
    best = int(np.nanargmax(goodness)) if np.isfinite(goodness).any() else None
    head = "".join(
        f'<th scope="col">{escape(shown(group.settings[heat_map.across]))}</th>' for group in heat_map.cells[0]
    )
    columns = len(heat_map.cells[0])
    body = "\n".join(
        f'<tr><th scope="row">{escape(shown(row[0].settings[heat_map.down]))}</th>'
        + "".join(
            _cell(group, metric, colour, i * columns + j == best)
            for j, (group, colour) in enumerate(zip(row, colours, strict=True))
        )
        + "</tr>"
        for i, (row, colours) in enumerate(zip(heat_map.cells, _between_0_and_1(goodness), strict=True))
    )
    title = ", ".join(filter(None, (name, heat_map.panel)))
    corner = escape(f"{named(heat_map.down)} ↓ {named(heat_map.across)} →")
    content = (
        f'<table class="heat"><thead><tr><th scope="col">{corner}</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )
    explanation = "No run has ended."
    if best is not None:
        winner = heat_map.cells[best // columns][best % columns]
        explanation = (
            f"Framed, the best: {winner.final(metric)} at {label(winner.settings, (heat_map.down, heat_map.across))}."
        )
    return f"<div>\n<h3>{escape(title)}</h3>\n{scrolling(title, content)}\n{paragraph(explanation, 'muted')}\n</div>"


def _cell(group: Group, metric: str, place: float, best: bool) -> str:
    value = Estimate(group.mean(metric), np.nan, np.nan, percent=metric.startswith("accuracy/"))
    return f'<td data-group="{group.key}"{" class=best" if best else ""}{_colours(place)}>{value.text()}</td>'


def _between_0_and_1(goodness: Array) -> Array:
    if not np.isfinite(goodness).any():
        return goodness
    low, high = np.nanmin(goodness), np.nanmax(goodness)
    return (goodness - low) / ((high - low) or 1.0)


def _colours(place: float) -> str:
    if not np.isfinite(place):
        return ""
    colour = LIGHT.batch_sizes(float(place))[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    ink = "#000000" if np.dot(linear, [0.2126, 0.7152, 0.0722]) > READ_EQUALLY else "#ffffff"
    return f' style="background:{to_hex(colour)};color:{ink}"'
