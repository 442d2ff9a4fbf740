import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.data import Split
from experiments.laboratory.problem import build, loss_of
from experiments.laboratory.temperature.runs import anneal, distance, judged, mixture, snapshots, training
from experiments.sampler import Sampler
from gradstats.optim import Constant

PROBLEM = "data=digits model=mlp 'model.widths=[8]' data.test_fraction=0.5"


def annealed(decays: bool, grows: bool, lr: float = 0.025) -> dict[str, Any]:
    return anneal(
        PROBLEM,
        "batch_invariant_sgd",
        lr,
        decays,
        grows,
        factor=4,
        stages=2,
        stage=1024,
        warmup=128,
        batch_size=16,
        points=2,
        seed=0,
    )


def test_ways_to_anneal_part_at_the_end_of_the_first_stage() -> None:
    constant, decayed, smith = annealed(False, False), annealed(True, False), annealed(True, True)
    assert constant["examples"] == decayed["examples"] == smith["examples"] == [512, 1024, 1536, 2048]
    assert constant["loss"][:2] == decayed["loss"][:2] == smith["loss"][:2]
    # A quarter of the learning rate, and a quarter of the steps of the second stage.
    assert decayed["loss"][3] - decayed["loss"][1] > 0.7 * (constant["loss"][3] - constant["loss"][1])
    assert smith["loss"][3] == pytest.approx(decayed["loss"][3], rel=0.02)
    assert (constant["steps"], decayed["steps"], smith["steps"]) == (128, 128, 64 + 16)
    assert annealed(False, True)["steps"] == 64 + 16


def test_training_is_that_of_the_method_at_its_own_batch_size() -> None:
    data, model = build(PROBLEM, seed=1)
    _, same = build(PROBLEM, seed=1)
    torch.manual_seed(2)
    list(training(data, model, "batch_invariant_sgd", 0.1, Constant(), 16, [16, 48], seed=5))
    optimizer = torch.optim.SGD(same.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    for indices in Sampler(len(data.train), 16, 5, torch.device("cpu")).until(48):
        optimizer.zero_grad()
        F.cross_entropy(same(data.train.x[indices]), data.train.y[indices]).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_methods_that_read_statistics_get_them() -> None:
    data, model = build(PROBLEM, seed=0)
    before = loss_of(model, data.train)
    steps = list(training(data, model, "batch_invariant_adam_r1", 0.01, Constant(), 32, [256, 512], seed=0))
    assert steps == [8, 16]
    assert loss_of(model, data.train) < before


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_distance_is_total_variation() -> None:
    a, b = log([0.5, 0.5], [1e-300, 1.0]), log([0.8, 0.2], [1.0, 1e-300])
    assert distance(a, a) == 0.0
    assert distance(a, b) == distance(b, a) == pytest.approx((0.3 + 1.0) / 2)


def test_an_ensemble_averages_probabilities() -> None:
    torch.testing.assert_close(mixture([log([0.2, 0.8]), log([0.6, 0.4])]), log([0.4, 0.6]))


def test_one_half_of_the_test_set_chooses_and_the_other_judges() -> None:
    split = Split(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]))
    found = judged(log([0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]), split)
    assert found["validation"] == pytest.approx(math.log(2))
    assert found["loss"] == pytest.approx(-(math.log(0.1) + math.log(0.8)) / 2)
    assert found["accuracy"] == 0.5


def test_snapshots_of_cycles_and_of_one_run() -> None:
    found = snapshots(
        PROBLEM, "batch_invariant_sgd", 0.025, cycles=3, members=2, cycle=512, warmup=128, batch_size=16, seed=0
    )
    names = {"cycles, ensemble", "cycles, last", "one run, ensemble", "one run, last"}
    assert found.keys() == names | {"distance"}
    assert all(found[name]["loss"] < math.log(10) for name in names)
    assert found["cycles, last"] != found["one run, last"]
    assert all(0 < d < 1 for d in found["distance"].values())
