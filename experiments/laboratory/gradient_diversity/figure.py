"""How well scores find wrong labels along training, how gradients agree, and how diverse they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import interval_band
from experiments.estimate import Array, bounds, geometric_mean, resampled
from experiments.laboratory.gradient_diversity.analysis import Analysis
from experiments.laboratory.gradient_diversity.findings import PRECISE, when, wrong
from experiments.laboratory.gradient_diversity.look import DIFFERENT, KINDS, LOSS, NORM, SAME, SCORES
from experiments.themes import Theme, canvas


def caption(found: Analysis) -> str:
    share = wrong(found.shares[0])
    return (
        f"Along runs of {found.settings.method} at B = {found.batch_size}. Top left: of as many examples of the "
        "highest scores as there are wrong labels, the share that has one, at "
        f"{share}; dotted: {PRECISE:g}. Top right: of the wrong labels, the share that the model predicts, and "
        "held-out accuracy. Bottom left: mean cosine similarity of the gradients of two examples, of right labels "
        f"only, and at {share} of a wrong label and right ones. Bottom right: the batch-size bound n Delta of gradient "
        "diversity over the training set; dotted: the batch size. "
        f"Means over {len(found.settings.seeds)} seeds, at the bottom right geometric ones; bands are 95% intervals."
    )


def alternative(found: Analysis) -> str:
    share, early = found.shares[0], found.early
    told = ", ".join(f"{score} {found.score(share, 'found', score, early)}" for score in SCORES)
    return (
        f"Four charts along epochs. {when(found, early).capitalize()} precisions are {told}. Cosine similarity within "
        f"a class is {found.cosine(0.0, SAME, early)}, between classes {found.cosine(0.0, DIFFERENT, early)}. At the "
        f"end n Delta is {geometric_mean(found.numbers[0.0, 'bound'][:, -1])} without wrong labels."
    )


def draw(found: Analysis, theme: Theme) -> Figure:
    with canvas(theme, 8.0, 6.4, len(found.settings.seeds)) as figure:
        panels: Any = figure.subplots(2, 2)
        _precision(panels[0, 0], found, theme)
        _learnt(panels[0, 1], found, theme)
        _similarity(panels[1, 0], found, theme)
        _diversity(panels[1, 1], found, theme)
        for axes in panels.flat:
            _across_epochs(axes, found)
    return figure


def _across_epochs(axes: Axes, found: Analysis) -> None:
    """Logarithmic, with the initial model at its left end."""
    epochs = found.settings.epochs
    axes.set_xscale("symlog", linthresh=epochs[1], linscale=0.5)
    shown = [0, *epochs[1::2]] if epochs[0] == 0 else epochs[::2]
    axes.set_xticks(shown, [f"{epoch:g}" for epoch in shown])
    axes.minorticks_off()
    axes.set_xlim(min(epochs[0], 0), epochs[-1])
    axes.set_xlabel("epochs (0: the initial model)")


def _line(axes: Axes, found: Analysis, values: Array, colour: Any, label: str, line: str = "-") -> None:
    """Mean of values (S, T), with its interval."""
    mean, epochs = values.mean(axis=0), found.settings.epochs
    axes.plot(epochs, mean, line, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    if len(values) > 1:
        low, high = bounds(mean, resampled(values), len(values))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def _precision(axes: Axes, found: Analysis, theme: Theme) -> None:
    others = iter((theme.baselines[1], theme.baselines[3]))
    colours = {NORM: theme.ours[0], LOSS: theme.reference}
    for score in SCORES:
        values = found.quality[found.shares[0], "found", score]
        _line(axes, found, values, colours[score] if score in colours else next(others), score)
    axes.axhline(PRECISE, color=theme.faint, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_ylabel("precision = recall")
    axes.set_title(f"Finding {wrong(found.shares[0])}")
    axes.legend(fontsize=7.5, loc="lower center")


def _learnt(axes: Axes, found: Analysis, theme: Theme) -> None:
    for share, colour in zip(found.settings.shares, _by_share(found, theme), strict=True):
        if share:
            _line(axes, found, found.numbers[share, "learnt"], colour, f"{wrong(share)}: learnt")
        told = f"{wrong(share)}: held-out" if share else "held-out accuracy, right labels"
        _line(axes, found, found.numbers[share, "test_accuracy"], colour, told, "--")
    axes.set_ylim(0, 1)
    axes.set_ylabel("share")
    axes.set_title("Wrong labels learnt, and accuracy")
    axes.legend(fontsize=7.5, loc="center")


def _similarity(axes: Axes, found: Analysis, theme: Theme) -> None:
    colours = (theme.ours[0], theme.reference, theme.baselines[1], theme.baselines[3])
    for kind, colour in zip(KINDS, colours, strict=True):
        _line(axes, found, found.pairs[0.0 if kind in (SAME, DIFFERENT) else found.shares[0], kind], colour, kind)
    axes.axhline(0, color=theme.faint, linewidth=0.8, linestyle=":")
    axes.set_ylim(top=1.35)  # for the legend
    axes.set_ylabel("mean cosine similarity")
    axes.set_title("Agreement of gradients")
    axes.legend(fontsize=7.5, loc="upper right", ncols=2, columnspacing=1.0)


def _diversity(axes: Axes, found: Analysis, theme: Theme) -> None:
    for share, colour in zip(found.settings.shares, _by_share(found, theme), strict=True):
        logs = np.log(found.numbers[share, "bound"])
        mean = np.exp(logs.mean(axis=0))
        axes.plot(
            found.settings.epochs, mean, color=colour, marker="o", markersize=3, linewidth=1.4, label=wrong(share)
        )
        interval_band(axes, found.settings.epochs, logs, colour)
    axes.axhline(found.batch_size, color=theme.faint, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("n Delta (examples)")
    axes.set_title("Gradient diversity")
    axes.legend(fontsize=7.5, loc="upper left")


def _by_share(found: Analysis, theme: Theme) -> list[Any]:
    return [theme.batch_sizes(i) for i in np.linspace(0, 1, len(found.settings.shares))]
