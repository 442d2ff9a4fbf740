from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.config import compose_config
from experiments.data import Split
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.sign_placement.signal import measured, signal
from experiments.laboratory.sign_placement.study import AFTER, AVERAGE, BEFORE, PLACES, SignPlacement
from experiments.launch import run_study
from experiments.report import Summary
from tests.experiments.contests import results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")

SETTINGS = settings("sign_placement")
LOSS = {AVERAGE: 0.1, BEFORE: 0.2, AFTER: 0.3}


def verdicts(loss: dict[str, float], signals: dict[str, float], noise: float = 0.01) -> list[str | None]:
    made = results(SETTINGS, lambda label, B: loss[label], noise=noise)
    for seed in SETTINGS.seeds:
        look = {PLACES[place]: {str(B): signals[place] for B in SETTINGS.batch_sizes} for place in PLACES}
        made.append(Result({"seed": seed, "looks": 3}, [look] * 3, 1.0))
    return [finding.verdict for finding in SignPlacement(SETTINGS).outcome(made).findings if finding.verdict]


def test_findings_come_out_every_way():
    predicted = {place: 1 / loss for place, loss in LOSS.items()}
    assert set(verdicts(LOSS, predicted)) == {"holds"}
    assert verdicts(LOSS, LOSS)[:3] == ["does not hold"] * 3
    assert set(verdicts({place: 1 - loss for place, loss in LOSS.items()}, predicted)) == {"does not hold"}
    assert set(verdicts(dict.fromkeys(LOSS, 0.1), predicted, noise=1.0)) == {"cannot be judged"}


def test_signals_that_differ_no_more_than_seeds_predict_nothing():
    random = np.random.default_rng(0)
    made = results(SETTINGS, lambda label, B: LOSS[label])
    for seed in SETTINGS.seeds:
        look = {place: {str(B): random.uniform(0.1, 1) for B in SETTINGS.batch_sizes} for place in PLACES.values()}
        made.append(Result({"seed": seed, "looks": 3}, [look] * 3, 1.0))
    told = [f for f in SignPlacement(SETTINGS).outcome(made).findings if "signal-to-noise" in f.bar]
    assert [finding.verdict for finding in told] == ["cannot be judged"] * 3


def test_what_cannot_be_followed():
    study = SignPlacement(SETTINGS)
    with pytest.raises(UserError, match="decay must be none"):
        study.jobs(compose_config(["experiment=short/sign_placement", "train.decay=cosine"]), [])
    given = SETTINGS.contestants | {AVERAGE: [*SETTINGS.contestants[AVERAGE], "engine.every=2"]}
    with pytest.raises(UserError, match=f"{AVERAGE} must leave the engine"):
        SignPlacement(dataclasses.replace(SETTINGS, contestants=given)).check()


def test_the_signal_in_closed_form():
    mu = torch.tensor([3.0, 4.0]).double()
    assert signal(mu, mu.expand(4, 2), 1.0) == pytest.approx(1)
    # Draws along the gradient, and as long across it: E u = mu, and tr Var u = 2 |mu|^2 over 3 of 4 degrees of freedom.
    across = torch.tensor([-4.0, 3.0]).double()
    draws = torch.stack([mu + across, mu - across])
    assert signal(mu, draws, 0.5) == pytest.approx(1)  # what the mean of two draws has of noise itself
    assert signal(mu, draws, 1.5) == pytest.approx(1 / (1 + 2))


def test_a_gradient_without_noise_is_the_same_everywhere():
    """Every example is the same one: signs before and after any mean are equal."""
    model = nn.Sequential(nn.Linear(4, 3))
    data = Split(torch.randn(1, 4).expand(32, 4), torch.zeros(32, dtype=torch.int64))
    found = measured(model, data, [4, 8], 16)
    first = found["before"]["4"]
    assert 0 < first < 1
    assert all(value == pytest.approx(first) for place in found.values() for value in place.values())


def test_what_averaging_leaves_grows_with_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    data = Split(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    found = measured(model, data, [1, 32], 64)
    assert found["before"]["1"] == found["after"]["1"]  # of one example the two are the same
    assert found["after"]["32"] > found["after"]["1"]


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/sign_placement", "tracker=none", "train.epochs=0.2"])
    assert config.study is not None
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warmup_examples=0))
    small = dataclasses.replace(config.study, seeds=[0], batch_sizes=[64, 128], workers=1)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 8
