from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments.config import compose_config
from experiments.laboratory.along import along, looked_at
from experiments.laboratory.problem import loss_of, problem_of
from experiments.train import train


@pytest.mark.parametrize("method", ["adam", "batch_invariant_adam", "batch_invariant_sign_sgd"])
def test_it_is_the_run_of_train(tmp_path: Path, method: str):
    config = compose_config([f"optimizer={method}", "tracker=none", "train.epochs=0.5", "train.warmup_examples=256"])
    record = train(config, tmp_path)
    problem = problem_of(config)
    counts = [count for count in record.examples if count % 16 == 0]
    assert len(counts) >= 2
    looks = along(problem, config.optimizer, 16, 256, 0, counts)
    found = [loss_of(looked_at(problem, 0, look.model), look.data.train) for look in looks]
    expected = [loss for count, loss in zip(record.examples, record.train_loss, strict=True) if count in counts]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)


def test_a_copy_is_attached_to_nothing():
    config = compose_config([])
    other = dataclasses.replace(config.optimizer)
    (_, _, model, _), *_ = along(problem_of(config), other, 16, 0, 0, [16])
    copy = looked_at(problem_of(config), 0, model)
    assert not copy.training and type(copy) is torch.nn.Sequential is not type(model)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def test_other_labels_are_those_that_it_learns():
    config = compose_config(["model.dropout=0"])
    problem = problem_of(config)

    def last(labels: torch.Tensor | None):
        *_, (_, data, model, _) = along(problem, config.optimizer, 16, 0, 0, [16, 1440], labels)
        return data, looked_at(problem, 0, model)

    data, plain = last(None)
    _, same = last(data.train.y.clone())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    shifted, other = last((data.train.y + 1) % 10)
    assert torch.equal(shifted.train.y, (data.train.y + 1) % 10) and shifted.test is data.test
    assert loss_of(other, shifted.train) < 1 < loss_of(other, data.train)


def test_statistics_of_every_batch_are_seen_before_its_step():
    config = compose_config(["optimizer=adam", "model.dropout=0"])
    seen: list[float] = []
    looks = along(
        problem_of(config),
        config.optimizer,
        16,
        0,
        0,
        [16, 48],
        gathered=("noise_scale",),
        each=lambda statistics: seen.append(float(statistics.noise_scale.total.trace)),
    )
    assert [len(seen) for _ in looks] == [1, 3] and min(seen) > 0
