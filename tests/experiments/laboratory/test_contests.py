"""The findings of every contest come out either way, and say so with numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from experiments import laboratory
from experiments.estimate import Finding
from experiments.laboratory import estimators, horizons, micro_batch, preconditioner, token_or_sequence
from tests.experiments.contests import results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")


def findings(name: str, loss: Callable[[str, int], float], **more) -> list[Finding]:
    study = settings(name)
    found = laboratory.load(study).outcome(results(study, loss, **more))
    return [finding for finding in found.findings if finding.verdict is not None]


def verdicts(name: str, loss: Callable[[str, int], float], **more) -> list[str | None]:
    return [finding.verdict for finding in findings(name, loss, **more)]


ORDER = {label: i for i, label in enumerate(["R = 1", "R = 4", "R = 16", "R = 64", "R = inf"])}


@pytest.mark.parametrize(
    ("loss", "curvature", "expected"),
    [
        (lambda label, B: 0.1 - 0.01 * ORDER.get(label, 0), {"R = inf": 0.5}, ["holds"] * 8 + ["does not hold"] * 2),
        (
            lambda label, B: {"R = inf": 0.2, "squared batch mean": 0.05, "variance": 0.3}.get(label, 0.1),
            {"R = 1": 0.5},
            ["does not hold"] * 8,
        ),
    ],
    ids=["confirmed", "refuted"],
)
def test_preconditioner(loss, curvature, expected):
    assert verdicts("preconditioner", loss, curvature=curvature)[: len(expected)] == expected


def test_a_best_reference_that_drifts():
    """At first the one with the steeper beginning is best, and at the end another: R = 1 and R = 16."""
    study = settings("preconditioner")
    made = results(study, lambda label, B: {"R = 16": 0.05}.get(label, 0.1))
    for result in made:
        if result.coordinates["contestant"] == "R = 1":
            result.found.train_loss = [v if i in (0, 5) else v / 3 for i, v in enumerate(result.found.train_loss)]
    told = preconditioner.STUDY(study).outcome(made).findings
    drift = [finding for finding in told if "drifts" in finding.bar]
    assert [finding.verdict for finding in drift] == ["holds", "holds"]
    assert "After 25% of the examples R = 1 is best, at the end R = 16" in drift[0].sentence


def test_micro_batch():
    quick = {micro_batch.MICROBATCH: 2.0}
    assert verdicts("micro_batch", lambda label, B: 0.1, seconds=quick) == ["holds"] * 6
    slow = {micro_batch.SAME: 2.0}
    worse = verdicts("micro_batch", lambda label, B: 0.2 if label == micro_batch.SAME else 0.1, seconds=slow)
    assert worse == ["does not hold"] * 6


def test_estimators():
    good = findings("estimators", lambda label, B: 0.1)
    assert {finding.verdict for finding in good} == {"holds"}
    bad = findings("estimators", lambda label, B: 0.1 if label == estimators.EXACT else 0.2)
    assert {finding.verdict for finding in bad} == {"does not hold"} and "2.0" in bad[0].sentence


@pytest.mark.parametrize(
    ("rounding", "told"),
    [("hardware", "own instructions round"), ("emulated", "without instructions"), (None, "nothing is rounded")],
)
def test_estimators_say_what_rounded(rounding, told):
    study = settings("estimators")
    made = results(study, lambda label, B: 0.1)
    for result in made:
        if result.coordinates["contestant"] == "bfloat16":
            result.found.rounding = rounding
    sentences = [finding.sentence for finding in laboratory.load(study).outcome(made).findings]
    said = [sentence for sentence in sentences if "round" in sentence]
    assert len(said) == 1 and told in said[0] and said[0].startswith("bfloat16, 50 runs: ")


def test_horizons():
    loss = {horizons.EWMA: 0.2, horizons.MEAN: 0.3}

    def best(label: str, B: int) -> float:
        return 2.0 if label == horizons.PER_BATCH and B == 256 else 0.0

    found = verdicts("horizons", lambda label, B: loss.get(label, 0.1), best=best)
    assert found == ["holds"] * 7 + ["does not hold"]
    worse = {horizons.DEBIASED: 0.3, horizons.SLIDES: 0.2}
    assert verdicts("horizons", lambda label, B: worse.get(label, 0.1))[:6] == ["does not hold"] * 6


def test_token_or_sequence():
    assert verdicts("token_or_sequence", lambda label, B: 1.0, noise=1e-4) == ["holds"] * 4

    def loss(label: str, B: int) -> float:
        return {token_or_sequence.ADAM: 0.8, token_or_sequence.SEQUENCE: 1.0}.get(label, 1.2)

    assert verdicts("token_or_sequence", loss, noise=1e-4) == ["does not hold"] * 4
    study = dataclasses.replace(settings("token_or_sequence"), batch_sizes=[16, 64])
    moved = results(study, lambda label, B: 1.0, best=lambda label, B: 2.0 * (B == 64), noise=1e-4)
    told = token_or_sequence.STUDY(study).outcome(moved).findings
    assert [finding.verdict for finding in told[8:12]] == ["does not hold"] * 4
