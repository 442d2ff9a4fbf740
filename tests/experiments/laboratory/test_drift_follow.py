from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradstats
from experiments.errors import UserError
from experiments.laboratory.drift.follow import (
    IN_UNITS,
    WHOLE,
    Trajectory,
    averaged,
    beta_of,
    follow,
    lengths_of,
    measured,
    scatter_of,
    trajectory,
)
from experiments.laboratory.problem import build, problem_of
from experiments.sampler import Sampler
from experiments.schemas.run import Config
from experiments.train import train
from gradstats.units import DebiasedEWMA

PROBLEM = "data=digits model=mlp 'model.widths=[8]' model.dropout=0 data.test_fraction=0.9"
RUN: dict[str, Any] = {
    "problem": PROBLEM,
    "method": "batch_invariant_adam",
    "lr": 0.01,
    "horizon": 64,
    "tuned_batch_size": 16,
    "batch_size": 16,
    "examples": 256,
    "warmup": 64,
    "seed": 1,
}


@pytest.mark.parametrize("method", ["batch_invariant_adam", "batch_invariant_adam_r1", "batch_invariant_adam_slides"])
def test_it_is_the_run_of_the_training_loop(method: str, short: Callable[..., Config], tmp_path: Path) -> None:
    config = short(
        f"optimizer={method}",
        "model.widths=[8]",
        "model.dropout=0",
        "train.epochs=1",
        "seed=1",
        "optimizer.lr=0.01",
        f"optimizer.betas=[{beta_of(64, 16)},0.999]",
    )
    record = train(config, tmp_path)
    own = {"problem": problem_of(config), "method": method, "examples": 1280, "warmup": 256}
    found = follow(**RUN | own, phases=2, lengths=3)
    assert record.examples[-1] == 1280
    assert found["loss"] == pytest.approx(record.train_loss[-1], rel=1e-5)


def test_gradients_and_noise_are_those_of_the_training_set_at_the_start() -> None:
    found = trajectory(**RUN)
    data, model = build(PROBLEM, seed=1)
    rows = gradstats.per_example_gradients(model, F.cross_entropy, data.train.x, data.train.y)
    g = torch.cat([row.flatten(1) for row in rows.values()], dim=1).double().numpy()
    batch = Sampler(len(data.train), 16, 1, torch.device("cpu")).stream(0, 16)
    assert found.true[0] == pytest.approx(g.mean(axis=0), abs=1e-6)
    assert found.variance[0] == pytest.approx(g.var(axis=0, ddof=1), abs=1e-6)
    assert found.batch[0] == pytest.approx(g[batch].mean(axis=0), abs=1e-6)
    assert found.true.shape == (16, g.shape[1])
    assert list(found.layers) == ["layer 1: Linear", "layer 3: Linear"]
    assert [(s.start, s.stop) for s in found.layers.values()] == [(0, 64 * 8 + 8), (64 * 8 + 8, g.shape[1])]


def drifting(steps: int, speed: float, noise: float) -> Trajectory:
    """A gradient (t speed, 1), with independent noise of this deviation in a batch of 4 in its second element only."""
    true = np.stack([speed * np.arange(steps), np.ones(steps)], axis=1)
    batch = true + np.stack([np.zeros(steps), noise * np.random.default_rng(0).normal(size=steps)], axis=1)
    variance = np.tile([0.0, 4 * noise**2], (steps, 1))
    return Trajectory(4, true, batch, variance, {"first": slice(0, 1), "second": slice(1, 2)}, 0.0)


def test_drift_and_noise_of_a_line() -> None:
    found = measured(drifting(400, speed=0.1, noise=0.5), phases=2, lengths=[4, 8, 16])
    last = found[WHOLE][-1]
    assert last["drift"] == pytest.approx([0.01, 0.04, 0.16])
    assert last["noise"] == pytest.approx(1.0)
    assert last["examples"][1] == 1600
    assert last["examples"][0] == found[WHOLE][0]["examples"][1]
    assert found["second"][-1]["drift"] == pytest.approx([0.0, 0.0, 0.0])
    assert found["second"][-1]["signal"] == pytest.approx(1.0)


def test_an_average_lags_by_its_horizon_and_has_the_noise_of_independent_batches() -> None:
    found = measured(drifting(40_000, speed=0.1, noise=0.5), phases=2, lengths=[16, 64])
    for i, n in enumerate((16, 64)):
        rho = (1 - 1 / n) ** 4
        lag = 0.1 * rho / (1 - rho)
        assert found["first"][-1]["lag"][i] == pytest.approx(lag**2)
        assert found["first"][-1]["error"][i] == pytest.approx(lag**2)
        assert found["second"][-1]["scatter"][i] == pytest.approx(scatter_of(n, 1.0, 4), rel=0.1)
        assert found["second"][-1]["lag"][i] == pytest.approx(0.0)
        assert found[WHOLE][-1]["error"][i] == pytest.approx(
            found["first"][-1]["error"][i] + found["second"][-1]["error"][i]
        )
    assert scatter_of(64, 1.0, 4) == pytest.approx(1 / (2 * 64), rel=0.02)


def test_in_units_of_the_noise_an_element_without_noise_does_not_count() -> None:
    found = measured(drifting(400, speed=0.1, noise=0.5), phases=2, lengths=[4, 8, 16])[IN_UNITS][-1]
    assert found["noise"] == pytest.approx(1.0)
    assert found["signal"] == pytest.approx(1.0)
    assert found["drift"] == pytest.approx([0.0, 0.0, 0.0])


def test_where_the_run_ends_before_there_is_no_drift() -> None:
    found = measured(drifting(20, speed=0.1, noise=0.5), phases=2, lengths=[4, 64])
    assert found[WHOLE][1]["drift"] == [pytest.approx(0.01), None]


def test_averages_are_those_of_the_library() -> None:
    values = np.random.default_rng(0).normal(size=(5, 2))
    average, found = DebiasedEWMA(1 - 1 / 10), np.zeros(2)
    for t, value in enumerate(values):
        w = average.weight(4, 4 * (t + 1))
        found = (1 - w) * found + w * value
    assert averaged(values, 10, 4)[-1] == pytest.approx(found)


def test_horizons_and_betas() -> None:
    assert lengths_of(16, 3) == [16, 32, 64]
    assert beta_of(1, 16) == 0
    assert beta_of(160, 16) == pytest.approx((1 - 1 / 160) ** 16)


def test_only_adam_can_be_followed() -> None:
    with pytest.raises(UserError, match="study.method=sgd_linear"):
        trajectory(**RUN | {"method": "sgd_linear"})
