"""What the figure shows."""

from __future__ import annotations

from matplotlib.axes import Axes

from experiments.benchmarks.plot import draw, library
from tests.experiments.benchmarks.synthetic import run


def shown(axes: list[Axes]) -> list[Axes]:
    return [panel for panel in axes if panel.axison]


def test_contestants_that_are_right_are_points() -> None:
    prices, growth = shown(draw(run()).axes)
    points = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in prices.lines if line.get_marker() != "None"
    }
    assert points == {(1.5, 1.04), (1.125, 0.0), (1.6, 1.04), (1.01, 1.04), (120.4, 1.04), (9.5, 1.04), (1.02, 1.04)}
    assert [list(line.get_ydata()) for line in growth.lines] == [[1.0, 2.0], [2.0, 8.0]]
    assert growth.get_xlabel() == "B"


def test_libraries_have_their_own_colours() -> None:
    titles = ["gradstats, engine opacus", "Opacus, hooks", "BackPACK, Variance", "torch.func, all at once", "a loop"]
    assert len({library(title) for title in titles}) == len(titles)
