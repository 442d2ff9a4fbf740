"""The table of values at other batch sizes."""

import inspect
import re

import pytest
import torch
from torch import nn

from gradstats import attach, optim
from gradstats.optim.base import ExampleOptimizer
from tests.gradstats.optim.problem import problem, train

EXPORTED = [getattr(optim, name) for name in optim.__all__]
KINDS = [kind for kind in EXPORTED if inspect.isclass(kind) and issubclass(kind, ExampleOptimizer)]


def cells(table):
    """Rows by their first cell; cells are two spaces apart."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines() if line]
    return {name: values for name, *values in rows}


def test_adam_in_torchs_units():
    model = nn.Linear(9, 10)
    optimizer = optim.BatchInvariantAdam(model.parameters(), 1e-3, (0.5, 0.9), batch_size=16, weight_decay=0.1)
    table = optimizer.describe(1, 16, 64)
    assert table.startswith(f"BatchInvariantAdam, {optimizer.path}")
    found = cells(table)
    decays = [float(cell) for cell in found.pop("weight_decay")]
    assert decays == pytest.approx([(1 - (1 - 1e-4) ** (1 / 16)) / 25e-5, 0.1, (1 - (1 - 1e-4) ** 4) / 2e-3], rel=1e-5)
    assert found == {
        table.splitlines()[0]: [],
        "group 0, 100 elements": [],
        "tuned at B": ["16"],
        "lr an example": ["6.25e-05"],
        "second moment of": ["second_moment"],
        "R": ["16"],
        "average": ["debiased_ewma"],
        "torch.optim.AdamW at B": ["1", "16", "64"],
        "lr": ["0.00025", "0.001", "0.002"],
        "betas": ["0.957603, 0.993437", "0.5, 0.9", "0.0625, 0.6561"],
        "eps": ["4e-08", "1e-08", "5e-09"],
        "horizon of betas": ["23.5867, 152.36", "32, 160", "68.2667, 186.101"],
        "state, bytes": ["1,600", "800", "800"],
    }


def test_columns_are_aligned():
    lines = optim.BatchInvariantAdam(nn.Linear(2, 2).parameters()).describe(1, 256).splitlines()[3:]
    assert len(lines) == 12
    assert len({re.match(r".+?  +", line).end() for line in lines}) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_optimizer_is_described(kind):
    found = cells(kind(nn.Linear(2, 2).parameters(), lr=0.25, batch_size=4).describe(1, 4, 8))
    at = next(values for name, values in found.items() if name.endswith(" at B") and name != "tuned at B")
    assert at == ["1", "4", "8"]
    assert found["tuned at B"] == ["4"] and found["lr"][1] == "0.25" and len(found["state, bytes"]) == 3


def test_state_is_what_a_step_allocates():
    model, x, y = problem(torch.float32)
    attach(model)
    optimizer = optim.BatchInvariantAdam(model.parameters(), batch_size=16)
    told = [int(cell.replace(",", "")) for cell in cells(optimizer.describe(4, 16))["state, bytes"]]
    for size in (1, 0):
        train(model, optimizer, x, y, [16, 4][: 2 - size])
        state = [t for s in optimizer.state.values() for key, t in s.items() if not key.endswith("step")]
        assert sum(t.numel() * t.element_size() for t in state) == told[size]
    assert cells(optimizer.describe(16))["state, bytes"] == cells(optimizer.describe(4))["state, bytes"]  # it stays


def test_groups_and_the_batch_size_of_tuning():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "batch_size": 8}, {"params": [model.bias], "lr": torch.tensor(0.5)}]
    first, second = optim.BatchInvariantSGD(groups, lr=0.1, batch_size=2).describe().split("\n\n")[1:]
    assert cells(first)["torch.optim.SGD at B"] == ["8"] and cells(second)["torch.optim.SGD at B"] == ["2"]
    assert cells(first)["lr"] == ["0.1"] and cells(second)["lr"] == ["0.5"]


def test_an_example_moves_the_velocity_in_total():
    optimizer = optim.BatchInvariantSGD(nn.Linear(2, 2).parameters(), 0.1, 0.9, 0.5, batch_size=4)
    assert cells(optimizer.describe())["lr an example"] == ["0.125"]
    optimizer = optim.BatchInvariantSGD.in_examples(nn.Linear(2, 2).parameters(), lr=0.125, horizon=50)
    assert cells(optimizer.describe())["lr an example"] == ["0.125"]
    assert cells(optimizer.describe())["horizon of momentum"] == ["50"]
    optimizer = optim.AdaScale(nn.Linear(2, 2).parameters(), 0.1, 0.9, batch_size=4)
    assert cells(optimizer.describe())["lr an example"] == ["0.25"]


def test_what_torch_has_not_is_described_in_steps():
    optimizer = optim.BatchInvariantAdam(nn.Linear(2, 2).parameters(), 0.1, average="mean", batch_size=4)
    found = cells(optimizer.describe(8))
    assert found["a step at B"] == ["8"] and found["lr"] == ["0.2"] and found["horizon of betas"] == ["inf, inf"]


def test_the_batchs_own_second_moment_has_no_reference():
    optimizer = optim.BatchInvariantAdam(nn.Linear(2, 2).parameters(), source="squared_batch_mean")
    assert "R" not in cells(optimizer.describe())


def test_the_linear_rule_and_the_gain():
    found = cells(optim.MicrobatchAdamW(nn.Linear(2, 2).parameters()).describe(1, 8, 64))
    assert found["betas"] == ["0.9, 0.999", "0.2, 0.992", "0, 0.936"]
    model, x, y = problem()
    attach(model)
    optimizer = optim.AdaScale(model.parameters(), 0.1, 0.5, batch_size=4)
    train(model, optimizer, x, y, [16])
    found = cells(optimizer.describe(4, 16))
    assert float(found["gain"][1]) == pytest.approx(optimizer.iterations, rel=1e-5) and found["momentum"] == ["0.5"] * 2
    assert float(found["lr"][1]) == pytest.approx(0.1 * optimizer.iterations, rel=1e-5) and found["gain"][0] == "1"
