import numpy as np
import pytest

from experiments.estimate import (
    Estimate,
    Finding,
    at_edge,
    count,
    geometric_mean,
    listed,
    notes,
    over_seeds,
    ratio_of_means,
    resampled,
)


def test_the_interval_of_a_mean_is_about_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = over_seeds(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_statistic_of_rows_keeps_what_shares_a_seed_together() -> None:
    noise = np.random.default_rng(0).normal(size=8)
    pairs = np.stack([noise, noise + 1], axis=1)
    found = over_seeds(pairs, lambda rows: float((rows[:, 1] - rows[:, 0]).mean()))
    assert (found.low, found.value, found.high) == pytest.approx((1, 1, 1))
    assert resampled(pairs).shape == (1000, 2)


def test_what_is_no_number_with_one_of_the_seeds_has_no_interval() -> None:
    found = over_seeds(np.array([1.0, 2.0, np.nan]))
    assert np.isnan([found.value, found.low, found.high]).all() and found.verdict(5) == "cannot be judged"


def test_one_seed_has_no_interval() -> None:
    found = over_seeds(np.array([2.0]))
    assert found.value == 2 and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("estimate", "verdict"),
    [
        (Estimate(1, 0.5, 1.5), "holds"),
        (Estimate(3, 2.5, 3.5), "does not hold"),
        (Estimate(1.9, 1.5, 2.5), "cannot be judged"),
        (Estimate(1, np.nan, np.nan), "cannot be judged"),
    ],
)
def test_a_bar_is_judged_only_where_the_whole_interval_is_on_one_side(estimate: Estimate, verdict: str) -> None:
    assert estimate.verdict(2.0) == verdict


def test_a_ratio_of_means_keeps_seeds_together() -> None:
    first = np.array([1.0, 2.0, 6.0])
    found = ratio_of_means(3 * first, first)
    assert (found.low, found.value, found.high) == pytest.approx((3, 3, 3))
    assert ratio_of_means(np.array([1.0, 3.0]), np.array([1.0, 1.0])).value == 2


def test_a_ratio_of_means_is_positive_where_the_values_are() -> None:
    few = ratio_of_means(np.array([0.1, 5.0, 0.2]), np.array([1.0, 1.1, 0.9]))
    assert 0 < few.low < few.value < few.high
    signed = ratio_of_means(np.array([-0.1, 0.1, 0.0]), np.ones(3))
    assert signed.low < 0 < signed.high and signed.value == 0
    assert ratio_of_means(np.zeros(3), np.ones(3)).high == 0


def test_numbers_are_told_in_three_digits() -> None:
    told = [Estimate(value, np.nan, np.nan).text() for value in (0.5, 12.34, 321.4, 0.0, 3e-5, np.inf)]
    assert told == ["0.500", "12.3", "321", "0", "3e-05", "–"]
    assert listed([4, 0.5]) == "{4, 0.5}"


def test_only_what_lies_at_an_edge_is_told() -> None:
    assert at_edge("lr", []) == []
    (note,) = notes(at_edge("lr", ["Adam", "SGD"]))
    assert (note.bar, note.verdict) == ("", None)
    assert note.sentence == "The tuned lr lies at an edge of the grid, and may be better beyond it, for: Adam; SGD."


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int) -> None:
    random = np.random.default_rng(seeds)
    found = [over_seeds(random.normal(size=seeds)) for _ in range(1000)]
    covered = np.mean([estimate.low < 0 < estimate.high for estimate in found])
    assert 0.92 < covered < 0.98


def test_claims_are_counted() -> None:
    found = [Finding("", verdict, "") for verdict in ("holds", "does not hold", "holds", None)]
    assert count(found) == "2 hold, 1 does not hold"
    assert count([Finding("", "cannot be judged", "")] * 2) == "2 cannot be judged"
    assert count(found[3:]) == "no claim"


def test_a_geometric_mean_has_an_interval_above_zero() -> None:
    found = geometric_mean(np.array([0.01, 1.0, 100.0]))
    assert found.value == pytest.approx(1) and 0 < found.low < 1 < found.high
    assert found.high == pytest.approx(1 / found.low, rel=0.1)
    assert np.isnan(geometric_mean(np.array([2.0])).low)
