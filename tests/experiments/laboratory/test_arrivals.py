from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from experiments.contest.analysis import contest
from experiments.laboratory.noise_scale.arrivals import Arrivals, arrival, arrivals, reached
from experiments.record import Record
from tests.experiments.contests import EXAMPLES, FIRST, results, settings

STUDY = settings("noise_scale")
LABEL = next(iter(STUDY.contestants))
EVERYONE = np.arange(len(STUDY.seeds))
# Losses fall as a power of the examples' share, to 0.1 after 4,096 at the octave 1.
EXPECTED = 4096 * math.log(FIRST / 0.5) / math.log(FIRST / 0.1) / 16


def of(target: float, change: Callable[[Record, int], None] = lambda record, octave: None) -> Arrivals:
    made = results(STUDY, lambda label, _: 0.1, best=lambda *_: 1.0, noise=0)
    for result in made:
        change(result.found, round(float(result.coordinates["octave"] or 0)))
    return arrivals(contest(STUDY, made).runs[LABEL, 16], 16, target)


def test_steps_are_those_of_the_quickest_learning_rate():
    found = of(0.5)
    assert found.steps(EVERYONE) == pytest.approx(EXPECTED) and found.text() == f"{EXPECTED:.3g}"
    assert not found.is_censored and not found.at_edge


def test_a_loss_that_no_run_has_is_censored():
    found = of(0.05)
    assert found.steps(EVERYONE) == math.inf and found.text() == "more than 256"
    assert found.is_censored and not found.at_edge


def test_a_learning_rate_at_which_one_run_diverges_is_not_the_quickest():
    def diverges(record: Record, octave: int) -> None:
        """After it had been there."""
        if octave == 1 and record.seed == STUDY.seeds[0]:
            record.status = "diverged"

    found = of(0.5, diverges)
    assert EXPECTED < found.steps(EVERYONE) < math.inf
    assert found.steps(EVERYONE) == pytest.approx(EXPECTED / (1 - 0.2 / math.log(FIRST / 0.1)))
    # In a resample without that seed it is.
    assert found.steps(EVERYONE[1:]) == pytest.approx(EXPECTED)


def test_a_run_that_diverged_never_arrives():
    record = Record(LABEL, LABEL, 1.0, 16, 0, "", "finished", EXAMPLES, [2.0, 1.0, 0.5, 0.4, 0.3, 0.2])
    assert arrival(record, 0.5) == 512
    assert arrival(record, 0.1) == math.inf
    record.status = "diverged"
    assert arrival(record, 0.5) == math.inf


def test_between_two_looks_by_a_line():
    assert reached([0, 100, 200], np.array([2.0, 1.0, 0.0]), 0.25) == 175
    assert reached([0, 100, 200], np.array([2.0, 1.0, 0.5]), 0.25) == math.inf
    assert reached([0, 100, 200], np.array([2.0, 1.0, 3.0]), 1.0) == 100
