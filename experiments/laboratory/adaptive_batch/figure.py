"""The figure of the growing batch: loss along examples and along seconds, and the batch size beside the noise scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import headroom, interval_band, logarithmic
from experiments.estimate import Array
from experiments.laboratory.adaptive_batch.analysis import GROWING, Analysis
from experiments.laboratory.adaptive_batch.contenders import KEPT, STEP, fixed
from experiments.schemas.run import Decay
from experiments.themes import Theme, canvas

MARKERS = ("x", "+", "1", "2", "3", "4")


def caption(found: Analysis) -> str:
    return (
        "Left: training loss along the examples seen, each contender at its own tuned learning rate; at a fixed batch "
        "size the better of the decays. Middle: the same along the seconds of training (processor time), in runs that "
        "took turns; single markers are decays tuned for as many seconds as the growing batch of that colour takes. "
        "Right: batch size (solid) and noise scale over the training set (dotted). Geometric means, and medians of "
        f"seconds, over {len(found.settings.seeds)} seeds; bands are 95% intervals."
    )


def alternative(found: Analysis) -> str:
    rival = found.rival(found.slow)
    told = "; ".join(
        f"{label}: {found.ratio(label, rival)} times the training loss of {rival} in {found.steps(label, rival)} times "
        f"the steps, with a last batch of {found.races[label].size[:, -1].mean():.0f}"
        for label in GROWING
    )
    return f"Three charts. {told}."


def draw(found: Analysis, theme: Theme) -> Figure:
    shown = [fixed(Decay.none, found.slow), *(found.rival(B) for B in found.settings.batch_sizes), *GROWING]
    order = [theme.reference, *theme.baselines[2:]]
    colour = dict(zip(shown, order, strict=False)) | {KEPT: theme.ours[0], STEP: theme.baselines[0]}
    with canvas(theme, 11.5, 4.0, len(found.settings.seeds)) as figure:
        panels: Any = figure.subplots(1, 3)
        for label in shown:
            race = found.races[label]
            _curve(panels[0], found.counts, race.train, colour[label], label)
            _curve(panels[1], np.median(race.seconds, axis=0), race.train, colour[label], label)
        _at_equal_seconds(panels[1], found, colour, theme.ink)
        for label in GROWING:
            _grown(panels[2], found, label, colour[label])
        logarithmic(panels[0], "examples seen", "training loss (nats)", "At equal examples")
        logarithmic(panels[1], "seconds of training", "training loss (nats)", "At equal processor time")
        logarithmic(panels[2], "examples seen", "examples", "Batch size and noise scale")
        headroom(panels[2], 0.25)
        panels[0].legend(fontsize=7, labelspacing=0.25)
        panels[2].legend(fontsize=7, labelspacing=0.25, loc="upper left")
    return figure


def _curve(axes: Axes, x: Any, logarithms: Array, colour: Any, label: str) -> None:
    axes.plot(x, np.exp(logarithms.mean(axis=0)), color=colour, lw=1.4, marker="o", ms=2.5, label=label)
    interval_band(axes, x, logarithms, colour)


def _at_equal_seconds(axes: Axes, found: Analysis, colour: dict[str, Any], ink: str) -> None:
    handles = []
    for B, marker in zip(found.settings.batch_sizes, MARKERS, strict=False):
        handles += axes.plot([], [], color=ink, marker=marker, ms=5, lw=0, label=f"decay, B = {B}, for these seconds")
        for growing in GROWING:
            tuned = found.limited["seconds", growing, found.rival_at_equal("seconds", growing, B)]
            seconds = float(np.median(found.races[growing].seconds[:, -1]))
            axes.plot(seconds, tuned.loss().value, color=colour[growing], marker=marker, ms=5)
    axes.legend(handles=handles, fontsize=7)


def _grown(axes: Axes, found: Analysis, label: str, colour: Any) -> None:
    race = found.races[label]
    _curve(axes, found.counts, np.log(race.size), colour, label)
    known = np.isfinite(race.noise).all(axis=0)
    if known.any():
        counts = np.array(found.counts)[known]
        noise = np.exp(np.log(race.noise[:, known]).mean(axis=0))
        axes.plot(counts, noise, color=colour, lw=1.2, linestyle=":", label=f"{label}: noise scale")
