from __future__ import annotations

import dataclasses
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.digits import examples, network
from experiments.laboratory.problem import predictions
from experiments.laboratory.rms_units.analysis import EXPONENTS, UNITS
from experiments.laboratory.rms_units.runs import METHODS, deviation, rescaled, rmsprop, step_counts, trained
from experiments.laboratory.rms_units.study import RmsUnits
from experiments.laboratory.schemas import RmsUnitsConfig
from experiments.launch import run_study
from experiments.report import Summary
from experiments.study import Outcome, default_optimizer
from experiments.themes import DARK, LIGHT, image

SETTINGS = RmsUnitsConfig(
    name="rms_units",
    seeds=[0, 1, 2],
    workers=1,
    batch_size=16,
    epochs=0.5,
    warmup=64,
    octaves=[-1, 0, 1],
    floors=[1e-4, 1e-3, 1e-2],
    floor=1e-3,
    weight_scale=10,
    loss_scale=10,
    steps=20,
)


def outcome(
    moved: dict[tuple[float, str], float], losses: dict[tuple[float, str], float], noise: float = 0.01
) -> Outcome:
    """Change of predictions, and the final loss, where they are not those of an invariant step."""
    random = np.random.default_rng(0)
    octaves = np.array(SETTINGS.octaves)
    results = [
        Result(
            {"exponent": x, "units": u, "lr": 2.0**o, "floor": f, "seed": s},
            losses.get((x, u), 0.1) * math.exp(0.1 * o**2 + 0.1 * (f != 1e-3) + noise * random.normal()),
            1.0,
        )
        for x, u, o, f, s in product(EXPONENTS, UNITS, octaves, SETTINGS.floors, SETTINGS.seeds)
    ]
    results += [
        Result(
            {"exponent": x, "units": u, "floor_in_units": follows, "steps": SETTINGS.steps, "seed": s},
            [moved.get((x, u), 1e-13)] * len(step_counts(SETTINGS.steps)),
            1.0,
        )
        for x, u, follows, s in product(EXPONENTS, UNITS[1:], (True, False), SETTINGS.seeds)
    ]
    return RmsUnits(SETTINGS).outcome(results)


BY_UNITS = {(0.5, "weights"): 0.5, (1.0, "loss"): 0.5}


def test_findings_come_out_both_ways():
    better = {(1.0, u): 0.08 for u in UNITS} | {(0.5, "weights"): 0.3, (1.0, "loss"): 0.3}
    verdicts = [finding.verdict for finding in outcome(BY_UNITS, better).findings]
    assert verdicts == ["holds"] * 5
    worse = {(1.0, u): 0.12 for u in UNITS} | {(1.0, "weights"): 0.3, (0.5, "loss"): 0.3}
    verdicts = [finding.verdict for finding in outcome({(1.0, "weights"): 0.5}, worse).findings]
    assert verdicts == ["does not hold"] * 5
    same = outcome(BY_UNITS, {}, noise=0.5).findings
    assert [finding.verdict for finding in same[2:5]] == ["cannot be judged"] * 3


def test_the_sentences_have_the_numbers():
    found = outcome(BY_UNITS, {(1.0, "original"): 0.08, (1.0, "weights"): 0.16}, noise=0.0)
    assert "at most 1.0e-13" in found.findings[0].sentence and "up to 5.0e-01" in found.findings[0].sentence
    assert "0.800 [0.800, 0.800] times" in found.findings[2].sentence
    assert "becomes 2.00 [2.00, 2.00] times as high" in found.findings[3].sentence
    assert len({image(found.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2


@pytest.mark.parametrize("scale", [10.0, 0.1])
def test_other_units_are_the_same_function(scale: float):
    plain, other = network(0).double(), rescaled(network(0).double(), scale)
    assert not torch.allclose(plain[1].weight, other[1].weight)
    x = examples(torch.float64).x
    torch.testing.assert_close(predictions(plain, x), predictions(other, x), rtol=1e-12, atol=1e-12)


def test_the_step_in_closed_form():
    """The first one, where the debiased s is g^2: lr g / (|g|^(2 exponent) + (floor scale)^(2 exponent))."""
    for exponent in EXPONENTS:
        model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).double()
        before = [p.item() for p in model.parameters()]
        step = rmsprop(model, exponent, lr=0.1, floor=0.5, batch_size=16, scales=(1, 3))
        for p in model.parameters():
            p.grad = torch.full_like(p, -2.0)
        step(0.5)
        for p, b, eps in zip(model.parameters(), before, (0.5, 1.5), strict=True):
            expected = 0.5 * 0.1 * 2 / (2 ** (2 * exponent) + eps ** (2 * exponent))
            assert p.item() - b == pytest.approx(expected)


COMMON = {"batch_size": 16, "warmup": 64, "floor": 1e-3, "floor_in_units": True, "seed": 0, "steps": 20}


@pytest.mark.parametrize(
    ("exponent", "weight_scale", "loss_scale", "same"),
    [(1.0, 10.0, 1.0, True), (1.0, 1.0, 10.0, False), (0.5, 10.0, 1.0, False), (0.5, 1.0, 10.0, True)],
)
def test_each_step_has_its_own_invariance(exponent: float, weight_scale: float, loss_scale: float, same: bool):
    lr = default_optimizer(METHODS[exponent]).lr
    found = deviation(exponent, "", weight_scale, loss_scale, lr=lr, **COMMON)  # type: ignore[arg-type]
    assert len(found) == len(step_counts(20))
    assert (max(found) < 1e-9) == same and (max(found) > 1e-3) == (not same)


def test_a_floor_held_fixed_breaks_it():
    fixed = COMMON | {"floor_in_units": False, "floor": 1e-2}
    assert max(deviation(1.0, "", 10.0, 1.0, lr=2e-4, **fixed)) > 1e-6  # type: ignore[arg-type]


def test_step_counts():
    assert step_counts(20) == [1, 2, 4, 8, 16, 20] and step_counts(16) == [1, 2, 4, 8, 16]


def test_a_scale_of_one_is_a_user_error():
    with pytest.raises(UserError, match="study.loss_scale=1 must be above 1"):
        RmsUnits(dataclasses.replace(SETTINGS, loss_scale=1)).check()


def test_a_run_learns_in_its_units():
    arguments = {"batch_size": 16, "warmup": 64, "lr": 8e-3, "floor": 1e-3, "seed": 0, "epochs": 1}
    plain = trained(0.5, "original", 1.0, 1.0, **arguments)  # type: ignore[arg-type]
    assert plain < 1.0
    assert trained(0.5, "loss", 1.0, 8.0, **arguments | {"floor": 8e-3}) == pytest.approx(plain, rel=1e-4)  # type: ignore[arg-type]


def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/rms_units", "tracker=none"])
    small = dataclasses.replace(SETTINGS, seeds=[0, 1], octaves=[0], floors=[1e-3], epochs=0.1, warmup=16, steps=4)
    run_study(dataclasses.replace(config, study=small), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= 5
