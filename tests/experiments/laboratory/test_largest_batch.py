from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments import laboratory
from experiments.config import compose_config
from experiments.data import Split
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Measurement, Result, Training
from experiments.laboratory.largest_batch.analysis import BROKEN, log_crossing
from experiments.laboratory.largest_batch.findings import BATCHES, EXAMPLES, PLAIN, SHORT
from experiments.laboratory.largest_batch.look import lengths_of, look, sharpness, starts_of, variance
from experiments.laboratory.largest_batch.predictors import DRIFT, EDGE, FARTHEST, HORIZON, NOISE, Tuned, predictions
from experiments.laboratory.largest_batch.study import LargestBatch
from experiments.laboratory.problem import problem_of
from experiments.launch import run_study
from experiments.report import Summary
from experiments.themes import DARK, LIGHT, image
from gradstats import per_example_gradients
from tests.experiments.contests import results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")

NAME = "largest_batch"


def at(B: float, of: Tuned, seed: int) -> dict[str, Any]:
    """A look at which every predictor but the horizon says B."""
    jitter = 1 + 1e-3 * seed
    lengths = lengths_of(16, 1024)
    noise = {"trace": 1.0, "signal": 1 / B * jitter, "drift": [(n / B) ** 2 / B for n in lengths]}
    return {"examples": 1024, "lengths": lengths, "sharpness": of.stability(B), "plain": noise, "scaled": noise}


def findings(ends: Callable[[str], float], said: float, below: float = 2.0, price: float = 1.0) -> list[Finding]:
    """Losses grow as a power of B to BROKEN at `ends`, and at `below` times that with half the learning rate."""
    study = settings(NAME)

    def loss(label: str, B: int) -> float:
        return 0.1 * (1 if label in PLAIN else price) * BROKEN ** log_share(B, ends(label))

    made = results(study, loss, noise=1e-4)
    optimizers = {label: one.optimizer for label, one in LargestBatch(study).contestants().items()}
    for result in made:
        label, octave, B = (result.coordinates[key] for key in ("contestant", "octave", "batch_size"))
        result.found.lr = optimizers[str(label)].lr * 2.0 ** float(octave or 0)
        if octave == -1.0:
            last = 0.13 * BROKEN ** log_share(float(B or 0), below * ends(str(label)))
            result.found.train_loss = [2.0, *result.found.train_loss[1:-1], last]
    for label in PLAIN:
        overrides = shlex.join(study.contestants[label])
        tuned = Tuned.of(optimizers[label])  # type: ignore[arg-type]
        made += [
            Result({"overrides": overrides, "looks": 1, "seed": s}, [at(said, tuned, s)], 1.0) for s in study.seeds
        ]
    found = laboratory.load(study).outcome(made)
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    return [finding for finding in found.findings if finding.verdict is not None]


def log_share(B: float, end: float) -> float:
    return math.log(B / 16) / math.log(end / 16)


def test_findings_come_out_both_ways():
    good = findings(lambda label: 128 if label in PLAIN else 512, said=128)
    # The horizon is that of the configuration: 1,592 and 152 examples, of which one is right.
    assert [finding.verdict for finding in good] == ["does not hold"] + ["holds"] * 15
    assert "R = 16: 128 [128, 128] against 128 [128, 128], a ratio of 1.00" in good[1].sentence
    bad = findings(lambda label: {EXAMPLES: 700, BATCHES: 128, SHORT: 128}.get(label, 64), 16.5, below=0.4, price=1.3)
    assert {finding.verdict for finding in bad[1:]} == {"does not hold"}
    assert "a ratio of 1.3" in bad[-1].sentence


def test_what_does_not_end_within_the_batch_sizes_is_not_judged():
    unknown = findings(lambda label: 1e12, said=1024)
    assert {finding.verdict for finding in unknown[1:12]} == {"cannot be judged"}
    assert "beyond 1024" in unknown[0].sentence
    early = findings(lambda label: 1e12, said=64)
    assert [finding.verdict for finding in early[1:6]] == ["does not hold"] * 5


def test_where_curves_cross():
    limit = math.log(BROKEN)
    assert log_crossing([16, 64, 256], np.array([0, limit / 2, 3 * limit / 2])) == pytest.approx(math.log(128))
    assert log_crossing([16, 64, 256], np.array([0, 2 * limit, 0])) == pytest.approx(math.log(32))
    assert log_crossing([16, 64], np.array([0, limit / 2])) == math.log(64)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("above", [0.99, 1.01])
def test_the_edge_of_stability_is_that_of_descent(beta: float, above: float):
    """m <- beta m + (1 - beta) h p, p <- p - step m on a parabola: it diverges above the edge, and not below it."""
    tuned = Tuned(lr=0.1, beta=beta, batch_size=16)
    h = tuned.stability(16) * above
    p, m = 1.0, 0.0
    for _ in range(20_000):
        m = beta * m + (1 - beta) * h * p
        p -= 0.1 * m
        if abs(p) > 1e6:
            break
    assert (abs(p) > 1) == (above > 1)


def test_the_edge_in_closed_form():
    tuned = Tuned(lr=0.1, beta=0.99, batch_size=16)
    assert tuned.horizon == pytest.approx(16 / -math.log(0.99), rel=1e-3)
    for B in (1, 16, 1000):
        assert tuned.edge(tuned.stability(B)) == pytest.approx(B)
    # Far below the horizon (2 + 2 beta) / ((1 - beta) step) is about 4 N / (B step).
    assert tuned.stability(1) == pytest.approx(4 * tuned.horizon * 16 / 0.1, rel=1e-3)
    assert tuned.edge(-1.0) == FARTHEST


def test_predictions_meet():
    tuned = Tuned(0.1, 0.9, 16)
    found = predictions(tuned, at(100, tuned, 0))
    assert [found[name] for name in (EDGE, NOISE, DRIFT)] == pytest.approx([100, 100, 100])
    assert found[HORIZON] == tuned.horizon


def test_sharpness_is_that_of_the_whole_hessian():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    split = Split(torch.randn(20, 3).double(), torch.randint(2, (20,)))
    parameters = dict(model.named_parameters())
    scale = torch.rand(sum(p.numel() for p in parameters.values())).double() + 0.1

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([p.numel() for p in parameters.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, split.x), split.y)

    at_parameters = torch.cat([p.detach().flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(loss, at_parameters)
    expected = torch.linalg.eigvals(hessian / scale[:, None]).real.max().item()
    assert sharpness(model, split, scale) == pytest.approx(expected, rel=1e-2)


def test_variance_is_that_of_per_example_gradients():
    model = torch.nn.Linear(3, 2)
    split = Split(torch.randn(20, 3), torch.randint(2, (20,)))
    each = per_example_gradients(model, F.cross_entropy, split.x, split.y)
    expected = torch.cat([each[name].var(dim=0).flatten() for name, _ in model.named_parameters()])
    torch.testing.assert_close(variance(model, split).float(), expected)


def test_looks_are_whole_batches_within_the_run():
    assert lengths_of(16, 1024) == [16, 32, 64, 128, 256, 512, 1024]
    starts = starts_of(11264, 3, 1024, 16)
    assert starts[0] == 1120 and starts[-1] == 11264 - 1024 and len(starts) == 3
    assert starts_of(64, 2, 128, 16) == [16]


def test_a_look_at_a_short_run():
    problem = problem_of(compose_config(["model.dropout=0", "model.widths=[8]"]))
    (found,) = look(problem, "optimizer=batch_invariant_adam", 8e-3, 16, 16, 256, 1, 32, 0)
    assert found["lengths"] == [16, 32] and len(found["plain"]["drift"]) == 2
    assert found["sharpness"] > 0 and found["plain"]["trace"] > 0
    assert 0 < found["plain"]["drift"][0] < found["plain"]["drift"][1]


def test_looks_and_other_batch_sizes_follow_the_tuned_learning_rate():
    study = LargestBatch(settings(NAME))
    config = compose_config(["experiment=short/largest_batch", "model.widths=[8]"])
    made = results(study.settings, lambda label, B: 0.1, best=lambda label, B: 0.0 if B == 16 else -2.0)
    jobs = study.jobs(config, [r for r in made if r.coordinates["batch_size"] == 16])
    looks = [job for job in jobs if isinstance(job, Measurement)]
    assert len(looks) == len(PLAIN) * len(study.settings.seeds)
    assert {job.coordinates["lr"] for job in looks} == {0.032, 0.008}
    away = {
        job.coordinates["octave"] for job in jobs if isinstance(job, Training) and job.coordinates["batch_size"] == 64
    }
    assert away == {-1.0, 0.0, 1.0}
    rising = [r for r in made if r.coordinates["batch_size"] == 16 and r.coordinates["octave"] in (-2.0, -1.0)]
    assert not any(isinstance(job, Measurement) for job in study.jobs(config, rising))


def test_dropout_is_a_user_error():
    study = LargestBatch(settings(NAME))
    with pytest.raises(UserError, match=r"model\.dropout must be 0"):
        study.jobs(compose_config(["experiment=short/largest_batch", "model.dropout=0.5"]), [])
    wrong = dataclasses.replace(
        study.settings, contestants=study.settings.contestants | {BATCHES: ["optimizer=sgd_linear"]}
    )
    with pytest.raises(UserError, match="R = 16 must be kinds of BatchInvariantAdam"):
        LargestBatch(wrong).check()


def test_from_the_configuration_to_the_report(tmp_path: Path):
    overrides = ["train.epochs=0.5", "train.warmup_examples=0", "model.widths=[8]", "evaluation.multiple=64"]
    config = compose_config(["experiment=short/largest_batch", "tracker=none", *overrides])
    assert config.study is not None
    small = dataclasses.replace(config.study, seeds=[0], batch_sizes=[32, 64], looks=1, workers=1)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 16
