from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstats
from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Result
from experiments.laboratory.along import looked_at
from experiments.laboratory.noise_scale.analysis import told_by_noise
from experiments.laboratory.noise_scale.measure import (
    METHODS,
    ONE_PASS,
    TWO_SIZES,
    WHOLE,
    groups_of,
    noise_along,
    of_population,
    one_pass,
    two_sizes,
)
from experiments.laboratory.noise_scale.study import NoiseScaleStudy
from experiments.laboratory.problem import backward, build
from experiments.laboratory.schemas import NoiseScaleConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.themes import DARK, LIGHT, image
from tests.experiments.contests import FIRST, results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")

PROBLEM = "data=digits model=mlp model.normalisation=layer model.dropout=0"
EXAMPLES = [16, 256, 1024, 2048, 4096]
GROUPS = [WHOLE, "layer 1: Linear", "layer 2: LayerNorm"]


def study() -> NoiseScaleConfig:
    found = settings("noise_scale")
    assert isinstance(found, NoiseScaleConfig)
    return dataclasses.replace(found, targets=[0.5, 0.25], batch_sizes=[8, 16, 64, 256])


def by_law(critical: float) -> Callable[[str, int], float]:
    """Final losses of runs that come to a loss of 0.25 in S_min (1 + B_crit/B) steps."""

    def last(label: str, B: int) -> float:
        examples = 3900 / (256 + critical) * (B + critical)
        return FIRST * math.exp(-4096 * math.log(FIRST / 0.25) / examples)

    return last


def findings(
    loss: Callable[[str, int], float],
    scale: Callable[[int], float],
    norm: Callable[[float], float],
    bias: float = 1.0,
    error: float = 0.5,
    lowest: float = 0.1,
) -> list[Finding]:
    """scale: the noise scale at each look, norm: of it, that of normalisation; bias and error: of one pass; lowest: the
    last loss of the first seed's followed run."""
    random, s = np.random.default_rng(0), study()
    made = results(s, loss, noise=1e-3)
    for label in s.contestants:
        for seed in s.seeds:
            scales = [[scale(i), scale(i), norm(scale(i))] for i in range(len(EXAMPLES))]
            exact = np.array([[[1.0, value * math.exp(0.01 * random.normal())] for value in row] for row in scales])
            found: dict[str, Any] = {
                "examples": EXAMPLES,
                "groups": GROUPS,
                "loss": [
                    FIRST * ((lowest if seed == s.seeds[0] else 0.1) / FIRST) ** (n / EXAMPLES[-1]) for n in EXAMPLES
                ],
                "exact": exact.tolist(),
            }
            for method, times, spread in ((ONE_PASS, bias, error), (TWO_SIZES, 1.0, 1.0)):
                found[method] = {
                    "mean": (exact * np.array([1, times])).tolist(),
                    "spread": np.full(exact.shape[:2], spread).tolist(),
                }
            made.append(Result({"followed": label, "seed": seed}, found, 1.0))
    outcome = laboratory.load(s).outcome(made)
    assert len({image(outcome.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    return [finding for finding in outcome.findings if finding.verdict is not None]


def test_findings_come_out_both_ways():
    good = findings(by_law(64), lambda i: 60 + 3 * i, lambda total: total**1.4)
    assert [finding.verdict for finding in good] == ["holds"] * len(good) and len(good) == 18

    def uneven(label: str, B: int) -> float:
        """With 3 times the examples at one of the batch sizes."""
        last = by_law(64)(label, B)
        return FIRST * (last / FIRST) ** (1 / 3) if B == 16 else last

    bad = findings(uneven, lambda i: 1e5 if i < 3 else 1e3, lambda total: 1 / total, bias=2.0, error=2.0)
    told = {finding.bar.partition(": ")[2]: finding.verdict for finding in bad if finding.bar.startswith("SGD")}
    assert list(told.values()) == ["does not hold"] * 9


def test_what_never_comes_to_a_loss_is_no_number():
    def loss(label: str, B: int) -> float:
        return 0.3 if B == 256 else by_law(64)(label, B)

    found = [f for f in findings(loss, lambda i: 60 + 3 * i, lambda total: total) if f.bar.startswith("SGD")]
    told = {target: [f for f in found if f" {target:g}" in f.bar] for target in study().targets}
    assert [f.verdict for f in told[0.5][:2]] == ["holds"] * 2
    assert [f.verdict for f in told[0.25]] == ["cannot be judged"] * 3
    assert "more than 16 at B = 256. Nothing is fitted: at B in {256} no learning rate" in told[0.25][0].sentence
    assert all("no learning rate brings the runs of all seeds to 0.25" in f.sentence for f in told[0.25])
    assert not any("nan" in f.sentence or "inf" in f.sentence.split() for f in found)


def test_a_followed_run_that_never_comes_to_a_loss_is_no_number():
    found = findings(by_law(64), lambda i: 60 + 3 * i, lambda total: total, lowest=0.3)
    told = [f for f in found if f.bar.startswith("SGD") and " 0.25" in f.bar]
    assert [f.verdict for f in told] == ["holds", "cannot be judged", "cannot be judged"]
    assert all(f.sentence.endswith("Not every run that is followed comes to 0.25.") for f in told[1:])


def test_the_sentences_have_the_numbers():
    good = findings(by_law(64), lambda i: 64.0 + 1e-3 * i, lambda total: total)
    sentence = next(f.sentence for f in good if "tells the critical batch size" in f.bar)
    assert "It tells 64." in sentence and ("and 64." in sentence or "and 63." in sentence)


def test_a_constant_noise_scale_tells_itself():
    loss = np.log(np.array([2.0, 1.0, 0.5]))
    assert told_by_noise([16, 160, 320], loss, np.log(np.full(3, 50.0)), math.log(0.7), 16) == pytest.approx(50)
    assert math.isnan(told_by_noise([16, 160, 320], loss, np.zeros(3), math.log(0.1), 16))


def test_steps_count_by_what_they_are_worth():
    """From N = 1 to N = 3 along equal examples, at B = 1: E_min / S_min of ds = dS / (1 + N)."""
    N = np.linspace(1, 3, 10001)
    expected = (N / (1 + N)).mean() / (1 / (1 + N)).mean()
    examples = [0, *range(8, 808, 8)]
    scale = np.log(1 + 2 * np.array(examples) / 800)
    loss = -np.array(examples) / 800
    assert told_by_noise(examples, loss, scale, -1.0, 1) == pytest.approx(expected, rel=1e-3)


def test_the_scale_of_a_population_is_that_of_its_gradients():
    data, model = build(PROBLEM, 0)
    model.eval()
    part = data.train.take(torch.arange(40))
    exact = of_population(model, type(data.train)(*part))
    single = []
    for i in range(40):
        backward(model, part[0][i : i + 1], part[1][i : i + 1])
        single.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    of = torch.stack(single)
    mean = of.mean(dim=0)
    expected = torch.tensor([mean.square().sum(), (of - mean).square().sum(dim=1).mean()])
    torch.testing.assert_close(exact[0], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(exact[1:].sum(dim=0), exact[0])  # the layers, to all


def test_shards_of_one_example_are_the_norms_of_examples():
    data, model = build(PROBLEM, 0)
    copy, groups = looked_at(PROBLEM, 0, model), groups_of(model)
    x, y = data.train.x[:16], data.train.y[:16]
    two = two_sizes(copy, groups, x, y, 1)
    with gradstats.attach(copy, "noise_scale") as statistics:
        backward(copy, x, y)
        one = one_pass(statistics, groups)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-8)


def test_groups():
    _, model = build(PROBLEM, 0)
    groups = groups_of(model)
    assert list(groups) == [WHOLE, "layer 1: Linear", "layer 2: LayerNorm", "layer 4: Linear"]
    assert groups["layer 2: LayerNorm"] == ["2.weight", "2.bias"]


def test_along_a_run_both_estimates_are_close_to_the_truth():
    found = noise_along("SGD", PROBLEM, "optimizer=sgd_linear", 0.1, 16, 0, 64, 2, 20, 32, 128, 0)
    assert found["examples"] == [16, 64] and found["groups"][0] == WHOLE
    exact = np.array(found["exact"])
    for method in METHODS:
        means = np.array(found[method]["mean"])
        assert np.array(found[method]["spread"]).shape == exact.shape[:2]
        np.testing.assert_allclose(means[:, 0], exact[:, 0], rtol=0.3)


def test_settings_that_do_not_fit():
    s = study()
    for change, message in (
        ({"small": 48}, "study.small=48 must divide study.big=256"),
        ({"draws": 1}, "study.draws=1"),
        ({"targets": [0.1, 0.5]}, "must fall"),
        ({"followed_batch_size": 3}, "followed_batch_size=3 is none of"),
        ({"looks": 1}, "study.looks=1"),
    ):
        with pytest.raises(UserError, match=message):
            NoiseScaleStudy(dataclasses.replace(s, **change)).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("override", ["model.dropout=0.5", "train.max_norm=1", "train.decay=linear"])
def test_runs_that_cannot_be_followed(override: str):
    config = compose_config(["experiment=short/noise_scale", override])
    with pytest.raises(UserError, match="must be"):
        NoiseScaleStudy(study()).jobs(config, [])


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/noise_scale", "tracker=none", "train.epochs=0.5"])
    s = study()
    small = dataclasses.replace(
        s,
        contestants={"SGD": s.contestants["SGD"]},
        batch_sizes=[64, 128, 256],
        followed_batch_size=64,
        targets=[2.2],
        looks=2,
        draws=2,
        octaves=[-2, -1, 0],
        seeds=[0],
        workers=1,
    )
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 6
