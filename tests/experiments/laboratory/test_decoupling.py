from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import compose_config
from experiments.errors import UserError
from experiments.jobs import Result
from experiments.laboratory.decoupling.analysis import AXES, UNITS, best, final_log_loss, heat_map
from experiments.laboratory.decoupling.study import Decoupling, centre_lr, optimizer_at
from experiments.laboratory.schemas import DecouplingConfig
from experiments.launch import run_study
from experiments.optimizers import build_optimizer
from experiments.record import Record
from experiments.report import Summary
from experiments.schemas.optimizer import BatchInvariantSGDConfig
from experiments.study import default_optimizer
from experiments.themes import DARK, LIGHT, image

OCTAVES = [-2.0, -1.0, 0.0, 1.0, 2.0]
SETTINGS = DecouplingConfig(
    name="decoupling",
    seeds=[0, 1, 2],
    workers=1,
    batch_size=16,
    batch_sizes=[4, 64],
    momentum_horizons=[64, 256],
    gradient_horizons=[64, 256],
    square_horizons=[1024, 4096],
    epsilons=[0.1, 1.0],
    **{f"{axis}_octaves": OCTAVES for axis in AXES},  # type: ignore[arg-type]
)


def record(loss: float, status: str = "finished") -> Record:
    return Record("m", "m", 1.0, 16, 0, "f", status, [0, 256], [2.3, loss], [2.3, loss], [0.1, 0.9])  # type: ignore[arg-type]


def synthetic(shift: Callable[[str, str], float], noise: float = 0.02) -> list[Result]:
    """Parabolas in the octave, whose vertex moves by so many octaves an octave of the value."""
    random = np.random.default_rng(0)
    study = Decoupling(SETTINGS)
    return [
        Result(
            {"axis": axis, "units": units, "value": value, "lr": 2.0**octave, "seed": seed},
            record(
                0.05 * math.exp((octave - shift(axis, units) * math.log2(value / low)) ** 2 + noise * random.normal())
            ),
            1.0,
        )
        for axis in AXES
        for low in study.values(axis)[:1]
        for units in UNITS
        for value in study.values(axis)
        for octave in OCTAVES
        for seed in SETTINGS.seeds
    ]


@pytest.mark.parametrize("spacing", [1.0, 0.5])
@pytest.mark.parametrize("vertex", [-0.8, 0.0, 0.3])
def test_the_vertex_of_a_parabola_is_found_exactly(spacing: float, vertex: float):
    x = np.arange(-3, 3.1, spacing)
    np.testing.assert_allclose(
        best(x, np.stack([(x - vertex) ** 2, 5 * (x + vertex) ** 2 - 1])), [vertex, -vertex], atol=1e-12
    )


def test_it_is_fitted_within_an_octave_by_least_squares():
    x = np.arange(-2, 2.1, 0.5)
    losses = x**2 + 0.1 * np.random.default_rng(0).normal(size=len(x))
    losses[4] = -0.2
    curvature, slope, _ = np.polyfit(x[2:7], losses[2:7], 2)
    np.testing.assert_allclose(best(x, losses[None]), [-slope / (2 * curvature)])


def test_a_fall_to_the_end_of_the_grid_is_at_the_end():
    x = np.arange(-2.0, 3.0)
    np.testing.assert_allclose(best(x, np.stack([-x, x, -np.exp(x)])), [2, -2, 2])
    for shift in (0.6, -0.6):
        assert heat_map(synthetic(lambda *_, s=shift: s), "batch_size", "torch").edges == (64,)


def test_slope_and_drift_are_in_octaves():
    found = heat_map(synthetic(lambda *_: 0.25, noise=0.0), "batch_size", "torch")
    assert found.slope.value == pytest.approx(0.25)
    assert found.drift.value == pytest.approx(0.25 * 4)  # of B = 4 to 64
    assert found.best_lr[1].value == pytest.approx(2.0)


def test_a_run_that_failed_counts_with_its_initial_loss():
    assert final_log_loss(record(0.1)) == math.log(0.1)
    assert final_log_loss(record(5.0)) == final_log_loss(record(0.1, "diverged")) == math.log(2.3)


def test_findings_come_out_both_ways():
    moving = {"torch": 0.5, "examples": 0.0}
    kept = Decoupling(SETTINGS).outcome(synthetic(lambda _, units: moving[units])).findings
    lost = Decoupling(SETTINGS).outcome(synthetic(lambda _, units: 0.5 - moving[units])).findings
    assert [f.verdict for f in kept[: len(AXES)]] == ["holds"] * len(AXES)
    assert [f.verdict for f in lost[: len(AXES)]] == ["does not hold"] * len(AXES)
    assert (
        kept[-1].verdict is None and "Adam's eps, torch: at 1 the best learning rate is at an edge" in kept[-1].sentence
    )
    assert "a factor 16 in batch size B" in kept[0].bar and "in torch's units over 2.0" in kept[0].sentence
    assert "by +2.00 octaves, is from 4 to 64" in lost[0].sentence
    noisy = Decoupling(SETTINGS).outcome(synthetic(lambda *_: 0.12, noise=1.0)).findings
    assert noisy[0].verdict == "cannot be judged"


def test_optima_at_the_edge_of_the_grid_do_not_stand_still():
    """All of them lie 3 octaves beyond it, and are found at its last value."""
    results = [
        dataclasses.replace(r, found=record(0.05 * 2.0 ** -math.log2(float(r.coordinates["lr"] or 1))))
        for r in synthetic(lambda *_: 0.0)
    ]
    found = Decoupling(SETTINGS).outcome(results).findings
    assert "moves over 0 [0, 0] octaves" in found[0].sentence
    assert [f.verdict for f in found[: len(AXES)]] == ["cannot be judged"] * len(AXES)


def test_the_figure_is_drawn_in_both_themes():
    outcome = Decoupling(SETTINGS).outcome(synthetic(lambda *_: 0.1))
    assert len({image(outcome.draw(theme), "png") for theme in (LIGHT, DARK)}) == 2
    assert len(outcome.tables[0].rows) == len(AXES) * len(UNITS)


def test_torchs_momentum_and_ours_are_the_settings_of_the_slides():
    """v <- beta v + g with beta = 1 - B/N, and a mean of gradients whose step is B lr0."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for units, method in zip(UNITS, AXES["momentum_horizon"].methods, strict=True):
        default = default_optimizer(method)
        config = optimizer_at(default, "momentum_horizon", units, 64, 0.01, 16)
        assert isinstance(config, BatchInvariantSGDConfig)
        optimizer = build_optimizer([p], config, 16, None)
        p.data.zero_()
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step(batch_size=16)  # type: ignore[call-arg]
        beta = 1 - 16 / 64
        expected = 0.01 * (3 + 2 * beta + beta**2) if units == "torch" else 3 * 16 * 0.01
        assert -p.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("axis", "units", "expected"),
    [
        ("batch_size", "torch", {"lr": 0.01, "betas": (0.99, 0.999)}),
        ("batch_size", "examples", {"lr": 0.16, "betas": (0.99, 0.999), "reference_batch_size": 1}),
        ("gradient_horizon", "torch", {"betas": (0.75, 0.999)}),
        ("gradient_horizon", "examples", {"betas": ((1 - 1 / 64) ** 16, 0.999)}),
        ("square_horizon", "torch", {"betas": (0.99, 0.75)}),
        ("eps", "torch", {"eps": 64, "lr": 0.01}),
        ("eps", "examples", {"eps": 64, "lr": 0.16, "denominator": "slides"}),
    ],
)
def test_adams_settings(axis: str, units: str, expected: dict[str, object]):
    default = default_optimizer(AXES[axis].methods[UNITS.index(units)])
    values = dataclasses.asdict(optimizer_at(default, axis, units, 64, 0.01, 16))
    values["betas"] = tuple(values["betas"])
    assert {key: values[key] for key in expected} == expected


def test_the_grid_is_around_the_configurations_own_lr():
    assert centre_lr(default_optimizer("adam"), "torch") == default_optimizer("adam").lr
    sgd = default_optimizer("batch_invariant_sgd_debiased")
    assert centre_lr(sgd, "examples") == pytest.approx(default_optimizer("sgd_linear").lr / 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sizes": [16]}, "study.batch_sizes: .* two values or more"),
        ({"epsilons": [1.0, 0.1]}, "study.epsilons: .* ascending"),
        ({"eps_octaves": [0, 1, 3]}, "study.eps_octaves: .* evenly spaced"),
        ({"square_horizons": [16, 64]}, "no horizon of 16 examples"),
    ],
)
def test_wrong_settings_are_user_errors(values: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        Decoupling(dataclasses.replace(SETTINGS, **values)).check()  # type: ignore[arg-type]


@pytest.mark.slow
def test_from_the_configuration_to_the_report(tmp_path: Path):
    config = compose_config(["experiment=short/decoupling", "tracker=none", "train.epochs=0.2"])
    train = dataclasses.replace(config.train, warmup_examples=64)
    octaves = {f"{axis}_octaves": [-1.0, 0.0, 1.0] for axis in AXES}
    small = dataclasses.replace(SETTINGS, seeds=[0], **octaves)  # type: ignore[arg-type]
    run_study(dataclasses.replace(config, study=small, train=train), tmp_path)
    assert len(Summary.load(tmp_path).findings) >= len(AXES)
