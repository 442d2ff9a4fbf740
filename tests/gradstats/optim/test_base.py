"""What a step asks anew, and what it remembers."""

import pytest
import torch
from torch import nn

from gradstats.errors import GradstatsError
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


def test_parameters_in_the_same_memory_are_refused():
    a = nn.Parameter(torch.randn(2, 3))
    with pytest.raises(GradstatsError, match=r"\(2, 3\) and \(3, 2\).*b.weight = a.weight"):
        BatchInvariantSGD([a, nn.Parameter(a.data.view(3, 2))])
    optimizer = BatchInvariantSGD([a])
    with pytest.raises(GradstatsError, match="same numbers"):
        optimizer.add_param_group({"params": [nn.Parameter(a.data)]})
    assert len(optimizer.param_groups) == 1


def test_parts_of_one_buffer_and_what_has_no_memory_are_taken():
    flat = torch.randn(6)
    parts = [nn.Parameter(flat[:3]), nn.Parameter(flat[3:]), nn.Parameter(flat[:0])]
    nowhere = [nn.Parameter(torch.empty(size, device="meta")) for size in (2, 2)]
    lazy = nn.LazyLinear(2).weight
    BatchInvariantSGD([*parts, nn.Parameter(flat[:0]), *nowhere, lazy])
