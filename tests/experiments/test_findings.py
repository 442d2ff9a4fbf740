import dataclasses

import numpy as np
import pytest

from experiments.findings import Estimate, findings
from experiments.invariance import Analysis, analyse
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


def test_ours_worse_than_the_baselines_does_not_hold():
    worse = dataclasses.replace(COMPARISON, ours=("adam",), reference="ours")
    assert set(verdicts(analyse(study(), worse)).values()) == {"does not hold", "holds"}


def test_a_loss_out_of_reach_cannot_be_judged():
    slow = dataclasses.replace(COMPARISON, ours=("sgd",))
    finding = findings(analyse(study(), slow))[0]
    assert finding.verdict == "cannot be judged"
    assert "its lowest loss is" in finding.sentence


def test_an_accuracy_more_than_a_point_below_does_not_hold(analysis: Analysis):
    point = dataclasses.replace(analysis.point, accuracy_gap=np.full(5, -0.011))
    bars = verdicts(dataclasses.replace(analysis, point=point))
    assert bars["Ours: test accuracy within 1 point of that of Adam"] == "does not hold"


def test_an_interval_across_the_bar_is_said(analysis: Analysis):
    high = dataclasses.replace(analysis.high, regret_margin=np.full(5, 0.1))
    sentences = [
        finding.sentence for finding in findings(dataclasses.replace(analysis, high=high)) if "regret" in finding.bar
    ]
    assert all("across the bar" in sentence for sentence in sentences)


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
