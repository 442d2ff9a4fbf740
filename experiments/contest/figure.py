"""The figure of a contest: the final loss along the learning rate, and at the tuned one, for every batch size."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.contest.analysis import Contest
from experiments.drawing import bars, interval_band
from experiments.themes import Theme, canvas, plain_log_ticks

MARKERS = ("o", "s", "^", "D", "v", "P", "*")


def caption(found: Contest) -> str:
    return (
        "Top: final training loss along the learning rate, in octaves from each method's default. Bottom: at the "
        "tuned learning rate. One column a batch size. Geometric means over "
        f"{len(found.settings.seeds)} seeds; bands and bars are 95% intervals."
    )


def alternative(found: Contest) -> str:
    told = "; ".join(
        f"B = {B}: " + ", ".join(f"{label} {found.loss(label, B)}" for label in found.labels)
        for B in found.settings.batch_sizes
    )
    return f"Final training loss along the learning rate, and at the tuned one. {told}."


def colours(found: Contest, theme: Theme) -> dict[str, Any]:
    order = cycle([theme.ours[0], *theme.baselines, theme.ours[1]])
    others = [label for label in found.labels if label != found.settings.reference]
    return {found.settings.reference: theme.reference} | dict(zip(others, order, strict=False))


def draw(found: Contest, theme: Theme) -> Figure:
    sizes = found.settings.batch_sizes
    with canvas(theme, max(5.0, 3.4 * len(sizes)), 3.4 + 0.26 * len(found.labels), len(found.settings.seeds)) as figure:
        panels: Any = figure.subplots(2, len(sizes), squeeze=False, height_ratios=(3.0, 0.2 + 0.26 * len(found.labels)))
        for i, B in enumerate(sizes):
            _along_lr(panels[0, i], found, B, colours(found, theme))
            _tuned(panels[1, i], found, B, colours(found, theme), names=i == 0)
        panels[0, 0].set_ylabel("final training loss (nats)")
    return figure


def _along_lr(axes: Axes, found: Contest, B: int, colour: dict[str, Any]) -> None:
    for label, marker in zip(found.labels, cycle(MARKERS), strict=False):
        runs = found.runs[label, B]
        loss = np.exp(runs.train.mean(axis=0))
        axes.plot(runs.octaves, loss, color=colour[label], marker=marker, markersize=3.5, linewidth=1.3)
        interval_band(axes, runs.octaves, runs.train, colour[label])
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_xlabel("log2(lr / default)")
    axes.set_title(f"B = {B}")


def _tuned(axes: Axes, found: Contest, B: int, colour: dict[str, Any], names: bool) -> None:
    for i, (label, marker) in enumerate(zip(found.labels, cycle(MARKERS), strict=False)):
        loss = found.loss(label, B)
        axes.errorbar(loss.value, i, xerr=bars([loss]), color=colour[label], marker=marker, markersize=5, capsize=2)
    axes.set_yticks(range(len(found.labels)), found.labels if names else [""] * len(found.labels))
    axes.set_ylim(len(found.labels) - 0.5, -0.5)
    axes.set_xscale("log")
    plain_log_ticks(axes)
    axes.set_xlabel("training loss at the tuned lr (nats)")
