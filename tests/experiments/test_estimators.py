"""Errors against populations whose answer is known, the verdict against imaginary runs, and a study of seconds."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import estimators
from experiments.estimation_error import Error, Population, coincide, errors, sign_error
from experiments.estimator_verdict import Training, judge
from experiments.estimators import REFERENCES, Study
from gradstats.optim.moment import ESTIMATORS

METHODS = tuple(product(REFERENCES, ESTIMATORS))
SIZES = (1, 4, 16)
BETAS = (0.9, 0.99)


def gaussian(mean: float) -> Population:
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    return Population("gaussian", (g - g.mean(0)) / g.std(0, correction=0) + mean)


def test_truth_is_that_of_the_population() -> None:
    truth = gaussian(0.5).truth(4)
    assert truth == pytest.approx(0.25 + 1 / 4)
    assert gaussian(0.5).truth(math.inf) == pytest.approx(0.25)


@pytest.mark.parametrize("probes", [1, 4, 16])
def test_random_signs_scatter_as_their_formula_says(probes: int) -> None:
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(8, 3).double(), torch.randn(32, 8).double(), torch.randint(0, 3, (32,))
    measured, expected = sign_error(model, x, y, probes, draws=500)
    assert measured == pytest.approx(expected, rel=0.1)


def test_as_many_random_signs_as_there_are_contrasts_are_exact() -> None:
    model, x, y = torch.nn.Linear(8, 3).double(), torch.randn(16, 8).double(), torch.randint(0, 3, (16,))
    assert sign_error(model, x, y, probes=15, draws=2) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_estimator_finds_the_truth_in_the_end(batch_size: int) -> None:
    """A population of hardly any noise, where no average needs to be long."""
    found = errors(gaussian(100.0), batch_size, [16.0, math.inf], [4000], 2, BETAS, 16)
    assert {e.estimator for e in found} == set(ESTIMATORS)
    for e in found:
        assert max(map(abs, [*e.bias, *e.rms])) < 2e-3


def test_the_floor_holds_where_all_is_noise() -> None:
    """mu = 0: s comes out below zero in half of the elements, and then is q~/R."""
    for e in errors(gaussian(0.0), 4, [1024.0], [4000], 2, BETAS, 16):
        assert all(0.3 < share < 0.7 for share in e.floored)
        assert all(bias > 0.1 for bias in e.bias)


def test_only_what_one_batch_does_not_give_is_compared() -> None:
    found = errors(gaussian(1.0), 4, [2.0, 4.0, 16.0], [64, 128], 1, BETAS, 16)
    assert {e.reference_batch_size for e in found} == {16.0}
    assert {e.examples for e in found} == {64, 128}
    assert coincide(4, 4) and not coincide(1, 1) and not coincide(8, 4)


def imaginary(behind: dict[str, float], noise: float = 0.0, diverged: dict[str, int] | None = None) -> Training:
    """ln(loss) of an estimator is -2 and what it is behind, where it matters; -1 elsewhere, for all."""
    random = np.random.default_rng(0)
    loss = np.full((len(METHODS), len(SIZES), 4), math.exp(-1))
    broken = np.zeros(loss.shape, dtype=bool)
    score = np.array([[behind[e]] * 4 for _, e in METHODS])
    for m, (r, e) in enumerate(METHODS):
        for b, size in enumerate(SIZES):
            if not coincide(r, size):
                loss[m, b] = np.exp(-2 + behind[e] + noise * random.normal(size=4))
                broken[m, b, : (diverged or {}).get(e, 0)] = True
    return Training("imaginary", METHODS, SIZES, 16, np.ones(len(METHODS)), loss, broken, score)


def known_errors(rms: dict[str, float]) -> list[Error]:
    """At trained parameters, in the end; elsewhere the order is the other way round."""
    last = estimators.COUNTS[-1]
    trained = [Error("trained", 64.0, 4, e, last, [0.0], [value], [0.0]) for e, value in rms.items()]
    early = [Error("trained", 64.0, 4, e, 1, [0.0], [9 - value], [0.0]) for e, value in rms.items()]
    return [*trained, *early]


EVEN = {"running_average": 1.0, "previous": 2.0, "in_batch": 3.0}


def test_the_lowest_loss_wins() -> None:
    first, second, third = judge(
        [imaginary({"running_average": 0.2, "previous": 0.1, "in_batch": 0.0})], known_errors(EVEN)
    )
    assert (first.estimator, second.estimator, third.estimator) == ("in_batch", "previous", "running_average")
    assert (
        (first.score, third.score) == pytest.approx((0.0, 0.2))
        and first.ln_loss == pytest.approx(-2)
        and third.behind.value == pytest.approx(0.2) == third.behind.low == third.behind.high
    )


def test_tasks_weigh_alike() -> None:
    """One that is far better on one task wins over one that is a little better on the other."""
    one = imaginary({"running_average": 0.0, "previous": 0.01, "in_batch": 0.1})
    other = imaginary({"running_average": 0.3, "previous": 0.0, "in_batch": 0.1})
    assert judge([one], known_errors(EVEN))[0].estimator == "running_average"
    first, *_ = judge([one, other], known_errors(EVEN))
    assert (first.estimator, first.ln_loss) == ("previous", pytest.approx(-2 + 0.005))


def test_a_tie_is_decided_by_the_cells_that_are_lost() -> None:
    """The mean leaves it open, since one cell moves with the seeds; elsewhere the difference is small, and sure."""
    tied = imaginary({"running_average": 0.0, "previous": 0.02, "in_batch": 0.5})
    for behind, ahead in (("running_average", "previous"), ("previous", "running_average")):
        loss = imaginary({ahead: 0.0, behind: 0.02, "in_batch": 0.5}).loss
        loss[METHODS.index((64.0, ahead)), SIZES.index(4)] *= np.exp(0.3 + np.array([-2, 2, -2, 2]))
        first, second, last = judge([dataclasses.replace(tied, loss=loss)], known_errors(EVEN))
        assert (first.estimator, second.estimator, last.estimator) == (ahead, behind, "in_batch")
        assert first.ln_loss > second.ln_loss and first.lost == 0 < second.lost


def test_infinite_r_is_not_judged() -> None:
    at_infinity = imaginary({"running_average": 0.0, "previous": 0.1, "in_batch": 0.2})
    for m, (r, _) in enumerate(METHODS):
        if r == math.inf:
            at_infinity.loss[m] *= 10.0 if METHODS[m][1] == "running_average" else 1.0
    assert judge([at_infinity], known_errors(EVEN))[0].estimator == "running_average"


def test_a_run_that_diverged_counts_before_all_else() -> None:
    broken = imaginary({"running_average": 0.3, "previous": 0.1, "in_batch": 0.0}, diverged={"in_batch": 1})
    verdicts = judge([broken], known_errors(EVEN))
    assert [v.estimator for v in verdicts] == ["previous", "running_average", "in_batch"]
    assert verdicts[-1].diverged > 0


def test_estimators_share_the_runs_that_do_not_depend_on_them() -> None:
    study = Study(1, SIZES, (0,), 1, Path("nowhere"))

    def directories(r: float, b: int) -> dict[str, str]:
        return {e: study.run("digits", r, e, 1.0, b, 0).directory for e in ESTIMATORS}

    on_texts = study.run("topics", 16.0, "in_batch", 1.0, 4, 0)
    assert on_texts.model.name == "gpt" and on_texts.directory not in directories(16.0, 4).values()
    assert len(set(directories(16.0, 4).values())) == 3
    assert len(set(directories(16.0, 16).values())) == 1
    alone = directories(16.0, 1)
    assert alone["in_batch"] == alone["running_average"] != alone["previous"]


def test_a_study_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "REFERENCES", (64.0,))
    monkeypatch.setattr(estimators, "MULTIPLIERS", (0.5, 1.0))
    monkeypatch.setattr(estimators, "COUNTS", (64, 128))
    monkeypatch.setattr(estimators, "TRAINED_EPOCHS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    document = tmp_path / "optimizers.md"
    document.write_text("<!-- estimators: written -->\n<!-- /estimators -->\n")
    sizes = ["--tasks", "digits", "--epochs", "1", "--batch-sizes", "16", "64", "--seeds", "0"]
    directory = tmp_path / "study"
    monkeypatch.setattr("sys.argv", ["estimators", *sizes, "--directory", str(directory), "--document", str(document)])
    estimators.main()
    written = json.loads((directory / "estimators.json").read_text())
    assert sorted(v["estimator"] for v in written["verdicts"]) == sorted(ESTIMATORS)
    for run in written["training"]:
        assert run["R"] == 64 and all(0 < loss < 3 for losses in run["loss"].values() for loss in losses)
    at_64 = {tuple(run["loss"]["64"]) for run in written["training"] if run["lr"] == written["training"][0]["lr"]}
    assert len(at_64) == 1  # R = B: one batch is enough
    assert f"R > B: {written['verdicts'][0]['estimator']}" in document.read_text()
    monkeypatch.setattr(estimators, "train", None)  # the same command again reads the records
    estimators.main()
