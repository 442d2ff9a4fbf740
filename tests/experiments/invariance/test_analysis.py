import dataclasses

import numpy as np
import pytest

from experiments.grid import arrange
from experiments.invariance.analysis import (
    POSITIVE,
    Comparison,
    analyse,
    match,
    measure,
    out_of_reach,
    scores,
    spread,
    tune,
)
from tests.experiments.synthetic import COMPARISON, record, study

TWO = Comparison(ours=("a",), reference="b", tuning_batch_size=4, score_batch_sizes=(1, 4))


def both(**losses: list[list[float]]):
    """Records of methods with a single lr and seed; one curve for each of the batch sizes 1 and 4."""
    return [record(m, size, curve) for m, curves in losses.items() for size, curve in zip((1, 4), curves, strict=True)]


def test_identical_curves_score_zero():
    curve = [2.0, 1.0, 0.5]
    grid = arrange(both(a=[curve, curve], b=[curve, curve]))
    assert scores(grid, (1, 4)).tolist() == [[0.0], [0.0]]


def test_a_constant_factor_per_batch_size_is_its_known_deviation():
    # ln of factors 1 and e^0.2 has the unbiased deviation 0.2 / sqrt(2), at every checkpoint and seed.
    curve = np.array([2.0, 1.0, 0.5, 0.3])
    scaled = [2.0 * np.exp(0.2), *curve[1:] * np.exp(0.2)]
    grid = arrange(both(a=[curve.tolist(), scaled], b=[curve.tolist(), curve.tolist()]))
    np.testing.assert_allclose(scores(grid, (1, 4)), [[0.2 / np.sqrt(2)], [0.0]])


def test_checkpoints_in_the_first_5_percent_do_not_count():
    early = [2.0, 1.9, *[1.0] * 39]  # the second checkpoint is after 2.5% of the budget
    other = [2.0, 0.1, *[1.0] * 39]
    grid = arrange(both(a=[early, other], b=[early, early]))
    assert scores(grid, (1, 4))[0] == 0.0


def test_spread_is_the_mean_over_checkpoints():
    loss = np.exp([[0.0, 0.0], [2.0, 4.0]])  # (B, T): deviations sqrt(2) and 2 sqrt(2)
    assert spread(loss, axis=0) == pytest.approx(1.5 * np.sqrt(2))


def test_spread_of_one_value_is_unknown():
    assert np.isnan(spread(np.ones((1, 3)), axis=0))


def test_permuting_seeds_changes_nothing():
    grid = arrange(study())
    for field in dataclasses.fields(first := measure(grid, COMPARISON)):
        again = measure(grid.with_seeds(np.array([2, 0, 1])), COMPARISON)
        np.testing.assert_allclose(getattr(again, field.name), getattr(first, field.name), atol=1e-15)


def test_the_order_of_records_decides_only_the_order_of_methods():
    records = study()
    first, again = measure(arrange(records), COMPARISON), measure(arrange(records[::-1]), COMPARISON)
    np.testing.assert_allclose(again.score[::-1], first.score)
    np.testing.assert_allclose(again.regret[::-1], first.regret)


CURVE = np.array([4.0, 2.0, 1.0, 3.0])
SCORE = np.array([0.1, 0.2, 0.4, 0.9])


@pytest.mark.parametrize(("target", "score"), [(4.0, 0.1), (2.0, 0.2), (1.0, 0.4), (np.sqrt(2), 0.3), (3.0, None)])
def test_matching_reads_the_branch_below_the_tuned_lr(target: float, score: float | None):
    # 3.0 lies on both branches: below the tuned lr it is between 2 and 4, above it the score would be 0.9.
    expected = np.interp(np.log(3), np.log([2, 4]), [0.2, 0.1]) if score is None else score
    assert match(CURVE, SCORE, tuned=2, target=target) == pytest.approx(expected)


def test_matching_allows_for_rounding_at_the_tuned_lr():
    assert match(CURVE, SCORE, tuned=2, target=0.995) == pytest.approx(0.4)
    assert np.isnan(match(CURVE, SCORE, tuned=2, target=0.98))


def test_matching_beyond_the_smallest_lr_is_out_of_reach():
    assert np.isnan(match(CURVE, SCORE, tuned=2, target=4.1))


def test_matching_with_the_smallest_lr_tuned_has_no_branch():
    assert np.isnan(match(CURVE, SCORE, tuned=0, target=2.0))


def test_out_of_reach_says_why():
    analysis = analyse(study(), COMPARISON)
    methods = analysis.grid.methods
    assert "lowest loss" in out_of_reach(analysis, methods.index("sgd"), 0)
    assert out_of_reach(analysis, methods.index("ours"), 0) == ""


def test_regret_is_against_the_reference_tuned_at_each_batch_size():
    # The reference is tuned to lr 2 at B = 4, where lr 1 is better at B = 1. Columns: final losses at lr 1, 2.
    final = {("a", 1): (0.5, 0.4), ("a", 4): (0.6, 0.3), ("b", 1): (0.2, 0.7), ("b", 4): (0.4, 0.25)}
    records = [
        record(method, size, [2.0, loss], lr=lr)
        for (method, size), losses in final.items()
        for lr, loss in zip((1.0, 2.0), losses, strict=True)
    ]
    measures = measure(arrange(records), TWO)
    assert tune(arrange(records), TWO).tolist() == [1, 1]
    np.testing.assert_allclose(measures.regret, [[0.2, 0.05], [0.5, 0.0]])
    np.testing.assert_allclose(measures.mean_regret, [0.125, 0.25])
    np.testing.assert_allclose(measures.test_regret, [[0.3, 0.075], [0.75, 0.0]])
    np.testing.assert_allclose(measures.regret_margin, [-0.125, 0.0])
    np.testing.assert_allclose(measures.worst_loss, [0.4, 0.7])
    np.testing.assert_allclose(measures.final_loss, [0.3, 0.25])
    np.testing.assert_allclose(measures.targets, [0.25, 0.5])
    nearer = dataclasses.replace(TWO, loss_targets=(1.0, 1.2, 3.0))
    np.testing.assert_allclose(measure(arrange(records), nearer).targets, [0.25, 0.3, 0.75])


def test_kin_are_measured_and_nobodys_baseline():
    comparison = dataclasses.replace(COMPARISON, kin=("square_root",))
    with_kin, without = analyse(study(), comparison), analyse(study(), COMPARISON)
    kin = with_kin.grid.methods.index("square_root")
    assert with_kin.kin == [kin] and kin in without.baselines and kin not in with_kin.baselines
    np.testing.assert_array_equal(with_kin.point.matched_score, without.point.matched_score)
    assert with_kin.point.ratio[0, 0] < without.point.ratio[0, 0]  # without the best baseline


def test_a_diverged_run_counts_with_its_initial_loss():
    curve = [2.0, 1.0, 0.5]
    broken = record("a", 4, [2.0, 1.0])
    broken.status = "diverged"
    grid = arrange([record("a", 1, curve), broken, record("b", 1, curve), record("b", 4, curve)])
    assert grid.train_loss[0, 0, 1, 0].tolist() == [2.0, 1.0, 2.0]
    assert grid.test_loss[0, 0, 1, 0].tolist() == [3.0, 1.5, 3.0]
    assert grid.test_accuracy[0, 0, 1, 0, -1] == pytest.approx(np.exp(-2.0))
    assert grid.diverged.sum() == 1


def test_no_loss_counts_for_more_than_the_initial_one():
    grid = arrange(both(a=[[2.0, 50.0, 1.0], [2.0, 1.0, float("nan")]], b=[[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]))
    assert grid.train_loss[0, 0, :, 0].tolist() == [[2.0, 2.0, 1.0], [2.0, 1.0, 2.0]]


def test_only_common_example_counts_are_compared():
    more = record("a", 4, [2.0, 1.5, 1.0])
    more.examples = [0, 100, 256]
    grid = arrange([record("a", 1, [2.0, 1.0]), more])
    assert grid.examples.tolist() == [0, 256]


def test_missing_runs_are_named():
    records = [r for r in study() if (r.method, r.lr, r.batch_size, r.seed) != ("adam", 1e-3, 64, 2)]
    with pytest.raises(ValueError, match="1 of 375 runs have no record.* adam with lr 0.001, batch size 64, seed 2"):
        arrange(records)


def test_unequal_budgets_are_refused():
    with pytest.raises(ValueError, match=r"equal budgets.*'a': 2, 'b': 1"):
        arrange([record("a", 1, [2.0], lr=1.0), record("a", 1, [2.0], lr=2.0), record("b", 1, [2.0])])


def test_a_study_of_diverged_runs_is_refused():
    broken = record("a", 1, [2.0])
    broken.status = "diverged"
    with pytest.raises(ValueError, match="every run diverged"):
        arrange([broken])


def test_bootstrap_intervals_enclose_the_estimate_and_repeat():
    first, again = analyse(study(), COMPARISON), analyse(study(), COMPARISON)
    for name in ("score", "final_loss", "mean_regret", "test_accuracy"):
        point, low, high = (getattr(m, name) for m in (first.point, first.low, first.high))
        assert (low <= point + 1e-12).all() and (point <= high + 1e-12).all()
        assert (low < high).any()
        np.testing.assert_array_equal(low, getattr(again.low, name))


def test_intervals_of_what_is_positive_are_above_zero():
    """With two seeds, whose resamples are widened the most."""
    records = study(seeds=2)
    for one in records:
        if one.method == "adam" and one.seed == 1 and one.batch_size > 16:  # whose score depends on the seed
            one.train_loss = [loss * one.batch_size for loss in one.train_loss]
    analysis = analyse(records, COMPARISON)
    for name in POSITIVE:
        low, point, high = (getattr(m, name) for m in (analysis.low, analysis.point, analysis.high))
        known = np.isfinite(low)
        assert (low[known] > 0).all() and (low <= point + 1e-12)[known].all() and (point <= high + 1e-12)[known].all()
    (adam,) = [i for i, label in enumerate(analysis.grid.labels) if label == "Adam"]
    assert analysis.low.score[adam] < 0.5 * analysis.point.score[adam]


def test_one_seed_has_neither_intervals_nor_a_floor():
    analysis = analyse(study(seeds=1), COMPARISON)
    assert np.isfinite(analysis.point.final_loss).all()
    assert np.isnan(analysis.low.final_loss).all() and np.isnan(analysis.high.final_loss).all()
    assert np.isnan(analysis.seed_floor).all()


def test_seed_floor_of_a_known_factor():
    # Two seeds whose losses differ by e^0.2 at both batch sizes.
    curve = np.array([2.0, 1.0, 0.5])
    records = [
        record(method, size, [2.0, *(curve[1:] * np.exp(0.2 * seed))], seed=seed)
        for method in ("a", "b")
        for size in (1, 4)
        for seed in (0, 1)
    ]
    analysis = analyse(records, TWO)
    np.testing.assert_allclose(analysis.seed_floor, 0.2 / np.sqrt(2))
    np.testing.assert_allclose(analysis.point.score, 0.0)


def test_the_ratio_is_to_the_best_baseline_at_the_same_loss():
    point = analyse(study(), COMPARISON).point
    np.testing.assert_allclose(point.ratio[0, 0], point.matched_score[0, 0] / point.matched_score[3, 0])
    assert point.ratio[3, 0] == 1.0  # square root: the best that reaches this loss
