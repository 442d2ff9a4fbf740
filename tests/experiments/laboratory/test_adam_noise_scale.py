from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments import laboratory
from experiments.config import compose_config
from experiments.data import Split
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Result
from experiments.laboratory.adam_noise_scale.analysis import ADAM, LAWFUL, OURS, SIGN, peak_of
from experiments.laboratory.adam_noise_scale.measure import SIZES, moments_along, parts
from experiments.laboratory.adam_noise_scale.study import AdamNoiseScale
from experiments.laboratory.knee import surge_law
from experiments.laboratory.schemas import AdamNoiseScaleConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.themes import DARK, LIGHT, image
from tests.experiments.contests import results, settings

pytestmark = pytest.mark.usefixtures("few_resamples")

PROBLEM = "data=digits model=mlp model.widths=[4] model.dropout=0"


def study() -> AdamNoiseScaleConfig:
    found = settings("adam_noise_scale")
    assert isinstance(found, AdamNoiseScaleConfig)
    return dataclasses.replace(found, batch_sizes=[4, 16, 64, 256, 1024])


def surge(B: float, peak: float = 64) -> float:
    """The law, in octaves."""
    return float(surge_law(np.array([B / peak]))[0]) / math.log(2)


def findings(best: Callable[[str, int], float], size: float, online: float, noise: float = 1e-3) -> list[Finding]:
    """size: the measured B_noise, online: what it is online, in units of it."""
    s, random = study(), np.random.default_rng(0)
    made = results(s, lambda label, B: 0.1, best=best, noise=noise)
    for label in LAWFUL:
        for seed in s.seeds:
            of = size * 2 / math.pi * math.exp(0.01 * random.normal())
            law = np.exp(surge_law(np.array(SIZES) / size))
            found = {
                "examples": [1024, 2048],
                "mu2": [1.0, 0.5],
                "sigma2": [of, of / 2],
                "trace": [of, of / 3],
                "apart": [1.0, 1 / 3],
                "gain": [law.tolist()] * 2,
                "curvature": [[1.0] * len(SIZES)] * 2,
                "online_mu2": [1.0, 1.0],
                "online_sigma2": [online * of, online * of],
            }
            made.append(Result({"followed": label, "seed": seed}, found, 1.0))
    outcome = laboratory.load(s).outcome(made)
    assert len({image(outcome.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    return [finding for finding in outcome.findings if finding.verdict is not None]


def test_findings_come_out_both_ways():
    good = findings(lambda label, B: 0.0 if label == OURS else surge(B), 64.0, 1.0)
    assert [finding.verdict for finding in good] == ["holds"] * 15

    def uneven(label: str, B: int) -> float:
        """No rise at first, and highest at last."""
        return {4: 0.0, 16: 0.0, 64: -1.5, 256: 0.0, 1024: 1.0}[B]

    bad = findings(uneven, 2.0, 2.0)
    assert {f.verdict for f in bad if "B_noise measured" not in f.bar} == {"does not hold"}
    far = findings(lambda label, B: surge(B), 4.0, 1.0)
    assert {f.verdict for f in far if "B_noise measured" in f.bar} == {"does not hold"}


def test_a_peak_out_of_sight_is_not_judged():
    found = findings(lambda label, B: 0.5 * math.log2(B / 64), 64.0, 1.0, noise=0)
    told = [f.verdict for f in found if "B_noise" in f.bar]
    assert told == ["cannot be judged"] * 8


def test_the_sentences_have_the_numbers():
    found = findings(lambda label, B: surge(B), 32.0, 1.0)
    sentence = next(f.sentence for f in found if f.bar.startswith(f"{ADAM}: B_noise measured"))
    assert "It is 32." in sentence or "It is 31." in sentence
    assert "and 64." in sentence or "and 63." in sentence
    ours = next(f for f in found if f.bar.startswith(OURS))
    assert "up to B = 1024" not in ours.sentence and ours.verdict == "does not hold"


def test_the_peak_of_a_curve():
    octaves = np.arange(len(SIZES))
    assert peak_of(np.exp(-0.1 * (octaves - 5.3) ** 2), np.ones(len(SIZES))) == pytest.approx(2**5.3)
    assert peak_of(1.0 + octaves, np.ones(len(SIZES))) == SIZES[-1]
    assert math.isnan(peak_of(np.ones(len(SIZES)), -np.ones(len(SIZES))))


def test_the_parts_are_those_of_the_whole_hessian():
    """Of a softmax regression, whose Hessian has no rounding to speak of in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    data = Split(torch.randn(12, 3, dtype=torch.float64), torch.randint(4, (12,)))
    found = parts(model, data, 4000, torch.Generator().manual_seed(0))
    weight, bias = (p.detach() for p in model.parameters())

    def loss(flat: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        w, b = flat[:12].view(4, 3), flat[12:]
        return nn.functional.cross_entropy(data.x[rows] @ w.T + b, data.y[rows])

    at = torch.cat([weight.flatten(), bias])
    H = torch.autograd.functional.hessian(loss, at)
    single = torch.stack(
        [torch.autograd.functional.jacobian(lambda v, i=i: loss(v, slice(i, i + 1)), at) for i in range(12)]
    )
    mu, sigma = single.mean(dim=0), single.std(dim=0)
    s, apart = mu / sigma, H - torch.diag(H.diagonal())
    assert found["mu2"] == pytest.approx(float(mu.square().sum()))
    assert found["sigma2"] == pytest.approx(float(sigma.square().sum()))
    assert found["trace"] == pytest.approx(float(H.trace()), rel=0.05)
    assert found["apart"] == pytest.approx(float(s @ apart @ s), rel=0.2, abs=0.05)
    e = torch.erf((SIZES[3] / 2) ** 0.5 * s)
    assert found["gain"][3] == pytest.approx(float(mu @ e))
    assert found["curvature"][3] == pytest.approx(float(H.trace() + e @ apart @ e), rel=0.05)


@pytest.mark.parametrize("label", LAWFUL)
def test_online_moments_are_about_those_of_the_training_set(label: str):
    overrides = {ADAM: "[0.9,0.999]", SIGN: "[0,0]"}[label]
    # Hardly any learning: the run's batches, an epoch of them, are then those of one gradient.
    found = moments_along(label, PROBLEM, f"optimizer=adam 'optimizer.betas={overrides}'", 1e-6, 16, 0, 1408, 2, 1, 0)
    assert found["examples"] == [704, 1408]
    for part in ("mu2", "sigma2"):
        assert np.mean(found[f"online_{part}"]) == pytest.approx(np.mean(found[part]), rel=0.15)


def test_settings_that_do_not_fit():
    s = study()
    for change, message in (
        ({"batch_sizes": [16, 64]}, "three or more, rising"),
        ({"batch_sizes": [64, 16, 4]}, "three or more, rising"),
        ({"probes": 0}, "study.probes=0"),
        ({"contestants": {ADAM: s.contestants[ADAM]}}, "which the findings are about"),
    ):
        with pytest.raises(UserError, match=message):
            AdamNoiseScale(dataclasses.replace(s, **change)).check()  # type: ignore[arg-type]


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(
        ["experiment=short/adam_noise_scale", "tracker=none", "train.epochs=0.5", "evaluation.multiple=256"]
    )
    config.train.warmup_examples = 64
    small = dataclasses.replace(
        study(), batch_sizes=[64, 128, 256], followed_batch_size=64, looks=2, probes=1, octaves=[-1, 0, 1], seeds=[0]
    )
    run_study(dataclasses.replace(config, study=dataclasses.replace(small, workers=1)), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 15
