import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.drawing import across_batch_sizes, bars, headroom, interval_band, logarithmic, range_band
from experiments.estimate import Estimate, over_seeds
from experiments.themes import plain_log_ticks

VALUES = np.exp(np.random.default_rng(0).normal(size=(5, 3)))


def test_bars_go_to_the_ends_of_intervals_and_are_none_without_one() -> None:
    found = bars([Estimate(2, 1.5, 4), Estimate(1, np.nan, np.nan), Estimate(1, 1.1, 1.2)])
    assert np.allclose(found, [[0.5, 0, 0], [2, 0, 0.2]])


def test_bands_are_over_seeds() -> None:
    axes = Figure().subplots()
    range_band(axes, [1, 2, 3], VALUES, "k")
    interval_band(axes, [1, 2, 3], np.log(VALUES), "k")
    widest, narrow = (band.get_paths()[0].vertices for band in axes.collections)
    mean = over_seeds(np.log(VALUES[:, 0]))
    for vertices, ends in (
        (widest, (VALUES[:, 0].min(), VALUES[:, 0].max())),
        (narrow, (np.exp(mean.low), np.exp(mean.high))),
    ):
        at_one = np.asarray(vertices)[np.asarray(vertices)[:, 0] == 1, 1]
        assert (at_one.min(), at_one.max()) == pytest.approx(ends)


def test_ticks_are_batch_sizes_and_round_numbers() -> None:
    axes = Figure().subplots()
    axes.plot([4, 256], [0.2, 4])
    logarithmic(axes, "x", "y", "title")
    across_batch_sizes(axes, [4, 16, 256])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "16", "256"]
    assert {0.2, 0.5, 1.0, 2.0} <= set(axes.get_yticks().round(6))
    low, high = axes.get_ylim()
    headroom(axes, 0.5)
    assert axes.get_ylim() == pytest.approx((low, high * (high / low) ** 0.5))


def test_a_linear_axis_keeps_its_ticks() -> None:
    axes = Figure().subplots()
    axes.plot([0, 3], [0.2, 4])
    axes.set_yscale("log")
    ticks = axes.get_xticks()
    plain_log_ticks(axes)
    assert (axes.get_xticks() == ticks).all()
