"""Batch sizes that vary within a run: the learning curve does not notice."""

import functools

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from tests.optimizers import ROWS

# Examples seen at which losses are compared, log-spaced after a burn-in; every run stops exactly there.
MARKS = [512, 768, 1024, 1536, 2048, 3072, 4096]
BY_NAME = {row.name: row for row in ROWS}


@functools.cache
def digits():
    found = load_digits()
    return torch.tensor(found.images / 16).flatten(1), torch.tensor(found.target)


def learning_curve(row, lr, size):
    """ln of the loss over all examples at the marks; `size` gives a batch's size from the examples seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    row.attach(model)
    optimizer = row(model.parameters(), lr=lr)
    x, y = digits()
    order = torch.cat([torch.randperm(len(x)) for _ in range(3)])
    start, curve = 0, []
    for mark in MARKS:
        while start < mark:
            rows = order[start : min(mark, start + size(start))]
            start += len(rows)
            model.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(F.cross_entropy(model(x), y).log())
    return torch.stack(curve)


def score(curves):
    """Mean over example counts of the standard deviation over runs."""
    return torch.stack(curves).std(0).mean()


@pytest.mark.parametrize(("name", "lr"), [("momentum", 0.005), ("adam R=1", 0.02)])
def test_curves_of_varying_batches_are_as_close_as_those_of_constant_ones(name, lr):
    curve = functools.partial(learning_curve, BY_NAME[name], lr)
    draws = torch.Generator().manual_seed(0)
    small, middle, large = (curve(lambda e, b=b: b) for b in (8, 32, 128))
    ramp = curve(lambda e: int(8 * 16 ** (e / MARKS[-1])))
    at_random = curve(lambda e: int(8 * 16 ** torch.rand((), generator=draws)))
    assert middle[-1] < middle[0] - 0.7
    assert score([middle, ramp, at_random]) <= 1.2 * score([small, middle, large]) < 0.1
