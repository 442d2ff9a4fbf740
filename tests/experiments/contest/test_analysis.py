from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.contest.analysis import contest
from experiments.themes import DARK, LIGHT, image
from tests.experiments.contests import results, settings

STUDY = settings("micro_batch")
A, B, C = STUDY.contestants


def test_numbers_are_those_of_the_tuned_learning_rates():
    loss = {A: 0.2, B: 0.1, C: 0.4}
    found = contest(STUDY, results(STUDY, lambda label, _: loss[label], best=lambda label, B: float(B == 64), noise=0))
    assert [found.best(A, 16), found.best(A, 64)] == [2, 3]
    assert found.loss(A, 16).value == pytest.approx(0.2) and found.held_out(A, 16).value == pytest.approx(0.3)
    assert found.ratio(B, A, 16).value == pytest.approx(0.5)
    assert found.doubled(C, 16).value == pytest.approx(math.exp(0.2))
    assert found.kept(C, 64, 16).value == pytest.approx(math.exp(0.2)) and found.kept(C, 64, 64).value == 1
    assert not found.notes()


def test_equal_seconds_give_the_slower_one_fewer_examples():
    found = contest(STUDY, results(STUDY, lambda *_: 0.5, seconds={A: 2.0, B: 1.0}, noise=0))
    assert found.at_equal_seconds(A, B, 16).value == pytest.approx((2.0 / 0.5) ** 0.5)
    assert found.at_equal_seconds(B, A, 16).value == pytest.approx((0.5 / 2.0) ** 0.5)
    assert found.at_equal_seconds(B, C, 16).value == pytest.approx(1)


def test_at_equal_seconds_each_has_the_learning_rate_that_is_best_by_then():
    made = results(STUDY, lambda *_: 0.5, seconds={A: 2.0}, noise=0)
    for result in made:
        if result.coordinates["contestant"] == A and result.coordinates["octave"] == 2.0:
            # Soon at its last loss, which at the end is not the lowest.
            result.found.train_loss = [2.0] + [0.6] * 5
    found = contest(STUDY, made)
    assert found.best(A, 16) == 2
    assert found.at_equal_seconds(A, B, 16).value == pytest.approx(0.6 / 0.5)


def test_twice_the_highest_learning_rate_is_not_known():
    found = contest(STUDY, results(STUDY, lambda *_: 0.5, best=lambda *_: 2.0, noise=0))
    assert math.isnan(found.doubled(A, 16).value)


def test_a_learning_rate_that_was_not_run_is_not_seen_to_be_good():
    def best(label: str, B: int) -> float:
        return 2.0 if B == 16 else 0.0

    made = results(STUDY, lambda *_: 0.5, best=best, noise=0)
    found = contest(STUDY, made)
    assert found.is_kept(A, 64, 16, 3.0) == "holds"
    short = [r for r in made if r.coordinates["batch_size"] == 16 or r.coordinates["octave"] != 2.0]
    found = contest(STUDY, short)
    assert found.kept(A, 64, 16).value == pytest.approx(math.exp(0.2))
    assert found.is_kept(A, 64, 16, 3.0) == "cannot be judged" and found.is_kept(A, 64, 16, 1.1) == "does not hold"


def test_intervals_are_over_seeds_and_above_zero():
    found = contest(STUDY, results(STUDY, lambda label, _: 0.1, noise=1.0))
    ratio = found.ratio(A, B, 16)
    assert 0 < ratio.low < ratio.value < ratio.high
    narrow = contest(STUDY, results(STUDY, lambda label, _: 0.1, noise=0.01)).ratio(A, B, 16)
    assert narrow.high - narrow.low < ratio.high - ratio.low


def test_a_diverged_run_counts_with_its_first_loss_and_an_edge_is_told():
    all_of = results(STUDY, lambda *_: 0.5, best=lambda *_: 3.0, noise=0)
    for result in all_of:
        if result.coordinates["octave"] == 1.0:
            result.found.status = "diverged"
    found = contest(STUDY, all_of)
    np.testing.assert_allclose(np.exp(found.runs[A, 16].train[:, 3]), 2.0)
    assert "an edge of the grid" in found.notes()[0].sentence
    for result in all_of:
        result.found.status = "diverged"
    with pytest.raises(ValueError, match="diverged"):
        contest(STUDY, all_of)


def test_the_figure_differs_by_theme():
    from experiments.contest.figure import alternative, caption, draw
    from experiments.contest.tables import tables

    found = contest(STUDY, results(STUDY, lambda label, _: 0.1 * len(label)))
    assert len({image(draw(found, theme), "png") for theme in (LIGHT, DARK)}) == 2
    assert "seeds" in caption(found) and A in alternative(found)
    assert [len(table.rows) for table in tables(found)] == [3, 3]


def test_the_best_octave_lies_between_octaves():
    found = contest(STUDY, results(STUDY, lambda label, _: 0.1, best=lambda *_: 0.3, noise=0))
    assert found.best_octave(A, 16, found.everyone) == pytest.approx(0.3)


def test_no_interval_where_a_resample_is_no_number():
    found = contest(STUDY, results(STUDY, lambda *_: 0.1))
    whole = len(set(found.everyone.tolist()))
    once = found.over_finite(lambda rows: 2.0 if len(set(rows.tolist())) == whole else math.nan)
    assert once.value == pytest.approx(2) and math.isnan(once.low)
    assert found.over_finite(lambda rows: 2.0).low == pytest.approx(2)
