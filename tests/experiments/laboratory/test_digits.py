from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from experiments import laboratory
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.laboratory.digits import PROBLEM, examples, log_spaced, losses, network, training
from experiments.laboratory.problem import as_configured, loss_of, problem_of
from experiments.schemas.data import ArraysConfig
from experiments.schemas.model import MLPConfig, Normalisation
from experiments.train import train


def test_they_are_those_of_the_configuration():
    """As they were when results were measured, whose directories do not say it."""
    assert problem_of(compose_config([])) == PROBLEM
    config = as_configured(PROBLEM)
    assert config.data == ArraysConfig("digits", path=None, test_fraction=0.2, split_seed=0)
    assert config.model == MLPConfig("mlp", widths=[64], normalisation=Normalisation.none, dropout=0.5)


@pytest.mark.parametrize("name", ["bias_correction", "rms_units"])
@pytest.mark.parametrize("override", ["model.dropout=0", "model=convnet", "data.split_seed=1", "data=topics"])
def test_what_would_not_be_used_is_refused(name: str, override: str):
    config = compose_config([f"experiment=short/{name}", override])
    assert config.study is not None
    with pytest.raises(UserError, match=f"{config.name} trains on the digits, with the network of model=mlp"):
        laboratory.load(config.study).jobs(config, [])


def test_it_trains_as_experiments_train_does(tmp_path: Path):
    config = compose_config(
        ["optimizer=adam", "tracker=none", "train.epochs=0.4", "train.warmup_examples=128", "seed=3"]
    )
    record = train(dataclasses.replace(config, resume=False), tmp_path)
    model = network(3)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.99, 0.999), fused=True)

    def step(multiplier: float) -> None:
        optimizer.param_groups[0]["lr"] = config.optimizer.lr * multiplier
        optimizer.step()

    steps = training(model, step, batch_size=16, seed=3, warmup=128, counts=record.examples[1:])
    assert losses(model, steps, 2) == pytest.approx(record.train_loss[1:], rel=1e-6)


def test_the_scale_of_the_loss_is_that_of_the_gradients():
    norms = []
    for scale in (1.0, 8.0):
        model = network(0)
        steps = training(model, lambda _: None, batch_size=16, seed=0, warmup=0, counts=[16], loss_scale=scale)
        list(steps)
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
    assert norms[1] == pytest.approx(8 * norms[0])


@pytest.mark.parametrize("worse", [100.0, math.inf])
def test_no_loss_counts_for_more_than_the_initial_one(worse: float):
    model = network(0)
    initial = loss_of(model, examples())

    def spoil(_: float) -> None:
        for p in model.parameters():
            p.data.mul_(worse)

    steps = training(model, spoil, batch_size=16, seed=0, warmup=0, counts=[16, 32, 48])
    assert losses(model, steps, 3) == [initial] * 3


def test_counts_are_log_spaced_whole_batches():
    counts = log_spaced(16, 8, 12)
    assert counts[-1] == 8 * len(examples()) // 16 * 16 and counts == sorted(set(counts))
    assert all(count % 16 == 0 for count in counts) and 48 <= counts[0] <= 80
    assert log_spaced(256, 0.1, 5)[0] == 256
