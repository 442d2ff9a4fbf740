import dataclasses

import numpy as np
import pytest

from experiments.estimate import Estimate
from experiments.invariance.analysis import Analysis, analyse, scores
from experiments.invariance.findings import findings
from tests.experiments.synthetic import COMPARISON, study


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(study(), COMPARISON)


def verdicts(analysis: Analysis) -> dict[str, str | None]:
    return {finding.bar: finding.verdict for finding in findings(analysis) if finding.bar}


def test_every_bar_of_each_of_ours_has_a_verdict(analysis: Analysis):
    assert len(verdicts(analysis)) == 2 * 4
    assert set(verdicts(analysis).values()) == {"holds"}


def test_numbers_and_the_best_baseline_are_in_the_sentence(analysis: Analysis):
    first = findings(analysis)[0].sentence
    assert "(Square root)" in first
    assert f"{analysis.point.matched_score[0, 0]:#.3g}" in first
    assert f"{100 * analysis.point.ratio[0, 0]:.1f}" in first


def test_kin_are_named_beside_the_claim_and_targets_in_words():
    comparison = dataclasses.replace(COMPARISON, kin=("square_root", "sgd"), loss_targets=(1.0, 1.05))
    found = analyse(study(), comparison)
    once, nearer, *_ = findings(found)
    assert "(Adam)" in once.sentence and nearer.bar.endswith("at 1.05 times the final loss of Adam")
    score = found.point.matched_score[found.kin[0], 0]
    assert f"That of Square root, which averages the same squares by another road: {score:#.3g}" in once.sentence
    assert "That of Sgd, which averages the same squares by another road: none" in once.sentence


def test_the_batch_size_that_limits_the_score_is_named():
    records = study()
    for record in records:
        if record.batch_size == 4 and record.method == "ours":
            record.train_loss = [2 * loss for loss in record.train_loss]
    found = analyse(records, COMPARISON)
    (limit,) = [finding.sentence for finding in findings(found) if "adds most" in finding.sentence]
    kept = scores(found.grid, [1, 16, 64])[0, found.tuned[0]]
    assert "B = 4 adds most" in limit and f"that of Ours is {kept:.3g} instead of" in limit
    assert kept < 0.1 * found.point.score[0] and "that of Square root" in limit


def test_how_far_invariance_reaches():
    records = study()
    for record in records:
        if record.batch_size == 64 and record.method == "ours":
            record.train_loss = [2 * loss for loss in record.train_loss]
    found = analyse(records, COMPARISON)
    (told,) = [finding.sentence for finding in findings(found) if "up to 16" in finding.sentence]
    near, far = (
        scores(found.grid, sizes)[np.arange(len(found.tuned)), found.tuned] for sizes in ([1, 4, 16], [1, 4, 16, 64])
    )
    assert f"{near[0]:.3g} up to 16, {far[0]:.3g} up to 64" in told and far[0] > 5 * near[0]
    assert told.endswith(f"{near[found.baselines].min():.3g}, {far[found.baselines].min():.3g}.")


def test_ours_worse_than_the_baselines_does_not_hold():
    worse = dataclasses.replace(COMPARISON, ours=("adam",), reference="ours")
    assert set(verdicts(analyse(study(), worse)).values()) == {"does not hold", "holds"}


def test_a_loss_out_of_reach_cannot_be_judged():
    slow = dataclasses.replace(COMPARISON, ours=("sgd",))
    finding = findings(analyse(study(), slow))[0]
    assert finding.verdict == "cannot be judged"
    assert "its lowest loss is" in finding.sentence


@pytest.mark.parametrize(("share", "verdict"), [(0.96, "holds"), (0.62, "cannot be judged")])
def test_a_loss_that_many_resamples_do_not_reach_judges_nothing(analysis: Analysis, share: float, verdict: str):
    reachable = np.full_like(analysis.reachable, share)
    finding = findings(dataclasses.replace(analysis, reachable=reachable))[0]
    assert finding.verdict == verdict and f"over the {share:.0%} of resamples" in finding.sentence
    assert ("too few to judge by" in finding.sentence) == (verdict != "holds")


def test_an_accuracy_more_than_a_point_below_does_not_hold(analysis: Analysis):
    point, low, high = (
        dataclasses.replace(measures, accuracy_gap=np.full(5, gap))
        for measures, gap in ((analysis.point, -0.011), (analysis.low, -0.012), (analysis.high, -0.0105))
    )
    bars = verdicts(dataclasses.replace(analysis, point=point, low=low, high=high))
    assert bars["Ours: test accuracy at most 1 point below that of Adam"] == "does not hold"


def test_an_interval_across_the_bar_judges_nothing_and_is_said(analysis: Analysis):
    high = dataclasses.replace(analysis.high, regret_margin=np.full(5, 0.1), ratio=np.full((5, 2), 0.4))
    low = dataclasses.replace(analysis.low, accuracy_gap=np.full(5, -0.02))
    found = [f for f in findings(dataclasses.replace(analysis, low=low, high=high)) if f.bar]
    assert {f.verdict for f in found} == {"cannot be judged"}
    assert all("across the bar" in f.sentence for f in found)


def test_one_seed_judges_nothing():
    assert set(verdicts(analyse(study(seeds=1), COMPARISON)).values()) == {"cannot be judged"}


def test_diverged_runs_and_edges_of_the_grid_are_noted():
    records = study()
    records[0].status = "diverged"
    # Without the largest lr, the one before it is tuned and lies at the edge.
    text = " ".join(f.sentence for f in findings(analyse([r for r in records if r.lr < 2e-3], COMPARISON)) if not f.bar)
    assert "1 of 300 runs diverged (Ours 1)" in text
    assert "edge of the grid" in text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.01234, 0.01, 0.02), "0.0123 [0.0100, 0.0200]"),
        (Estimate(0.97665, 0.96, 0.98, percent=True), "97.7 [96.0, 98.0]"),
        (Estimate(-0.00002, -1e-4, 0), "-2e-05 [-0.000100, 0]"),
        (Estimate(float("nan"), float("nan"), float("nan")), "–"),
    ],
)
def test_estimates_read_as_number_and_interval(estimate: Estimate, text: str):
    assert str(estimate) == text
