from __future__ import annotations

import numpy as np
import pytest

from experiments.pages.axes import MOST_TICKS, Scale, axis, short


def test_places() -> None:
    linear, log = axis(np.array([0.0, 5.0, 10.0]), "linear"), axis(np.array([0.0, 1.0, 100.0]), "log")
    assert linear is not None and log is not None
    assert linear.places(np.array([0.0, 2.5, 10.0])).tolist() == [0, 0.25, 1]
    assert log.places(np.array([1.0, 10.0, 100.0])).tolist() == [0, 0.5, 1]
    assert np.isnan(log.places(np.array([0.0]))).all()


def test_a_margin_on_both_sides() -> None:
    found = axis(np.array([1.0, 2.0]), "linear", margin=0.1)
    assert found is not None and (found.low, found.high) == pytest.approx((0.9, 2.1))


def test_there_is_no_logarithm_of_what_is_negative() -> None:
    assert axis(np.array([-1.0, 1.0]), "log") is None
    assert axis(np.array([0.0, np.nan]), "log") is None
    assert axis(np.array([np.nan, np.inf]), "linear") is None


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_what_does_not_move_lies_in_the_middle(value: float) -> None:
    found = axis(np.array([value, value]), "linear")
    assert found is not None and found.places(np.array([value])).tolist() == [0.5]


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize(("low", "high"), [(256, 34_000), (0.01, 2.3), (2.1, 2.3), (1e-8, 1e6), (0.97, 0.98), (1, 1)])
def test_ticks_are_few_ordered_and_on_the_axis(low: float, high: float, scale: Scale) -> None:
    found = axis(np.array([low, high], dtype=float), scale, margin=0.05)
    assert found is not None
    ticks = found.ticks()
    places = [place for place, _ in ticks]
    assert 2 <= len(ticks) <= MOST_TICKS + 2 and places == sorted(places)
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)


def test_short_numbers() -> None:
    assert [short(value) for value in (0.05, 256, 1000, 34816, 2.5e6, 0, -3e9)] == [
        "0.05",
        "256",
        "1k",
        "34.82k",
        "2.5M",
        "0",
        "-3G",
    ]
