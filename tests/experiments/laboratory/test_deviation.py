import numpy as np
import pytest

from experiments.laboratory.deviation import largest_deviation


def test_the_point_that_is_furthest_off_counts() -> None:
    measured = np.tile([1.0, 2.2, 2.7], (4, 1))
    estimate = largest_deviation(measured, np.array([1.0, 2.0, 3.0]))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.1, 0.1, 0.1))


def test_scatter_over_seeds_widens_the_interval() -> None:
    measured = np.random.default_rng(0).normal(1.0, 0.05, (20, 3))
    estimate = largest_deviation(measured, np.ones(3))
    assert estimate.low == 0.0
    assert estimate.value < estimate.high < 0.06


def test_what_is_certainly_off_is_off_at_the_lower_end_too() -> None:
    measured = np.random.default_rng(0).normal(1.5, 0.05, (20, 3))
    estimate = largest_deviation(measured, np.ones(3))
    assert 0.4 < estimate.low <= estimate.value <= estimate.high < 0.6


def test_one_seed_has_no_interval() -> None:
    assert np.isnan(largest_deviation(np.ones((1, 2)), np.ones(2)).high)
