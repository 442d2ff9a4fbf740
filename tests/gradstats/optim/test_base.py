"""What a step asks anew, and what it remembers."""

import torch
from torch import nn

from gradstats.optim import BatchInvariantSGD


def test_whether_a_step_is_compiled_follows_parameters_and_options(monkeypatch):
    compiled = []
    monkeypatch.setattr("gradstats.optim.base.run", lambda *arguments: compiled.append(arguments[4]))
    small, large = nn.Linear(2, 2), nn.Linear(1024, 1024)
    for p in (*small.parameters(), *large.parameters()):
        p.grad = torch.zeros_like(p)
    optimizer = BatchInvariantSGD(small.parameters())
    optimizer.step(batch_size=1)
    optimizer.add_param_group({"params": large.parameters()})
    optimizer.step(batch_size=1)
    optimizer.compiled = False
    optimizer.step(batch_size=1)
    assert compiled == [False, True, True, False, False]


def test_the_path_is_not_worked_out_at_every_step(monkeypatch):
    asked = []
    monkeypatch.setattr("gradstats.optim.base.compiler", asked.append)
    model = nn.Linear(2, 2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = BatchInvariantSGD(model.parameters())
    for _ in range(3):
        optimizer.step(batch_size=1)
    assert asked == ["cpu"]
