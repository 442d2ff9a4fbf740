"""At the tuned batch size every optimizer with a counterpart in torch follows it: 200 steps of a ConvNet on digits."""

import functools
import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from tests.gradstats.optim.problem import vector
from tests.optimizers import COUNTERPARTS, TUNED

STEPS = 200
every = pytest.mark.parametrize("row", COUNTERPARTS, ids=lambda row: row.name)


@functools.cache
def digits():
    found = load_digits()
    return torch.tensor(found.images / 16).unsqueeze(1), torch.tensor(found.target)


def network(dtype, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 10),
    ).to(dtype)


def train(model, optimizer, seed, within=None):
    """Parameters after the batches of one seed; the examples within every batch in the order of another."""
    x, y = digits()
    x = x.to(next(model.parameters()).dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    shuffle = torch.Generator().manual_seed(seed if within is None else within)
    for i in range(STEPS):
        rows = order[torch.arange(i * TUNED, (i + 1) * TUNED) % len(x)]
        if within is not None:
            rows = rows[torch.randperm(TUNED, generator=shuffle)]
        model.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return vector(model)


def ours(row, dtype, seed):
    model = network(dtype, seed)
    row.attach(model)
    return train(model, row(model.parameters()), seed)


def theirs(row, dtype, seed, within=None, **path):
    model = network(dtype, seed)
    return train(model, row.torchs(model.parameters(), **path), seed, within)


@every
def test_is_torchs_in_float64(row):
    a, b = (run(row, torch.float64, 0) for run in (ours, theirs))
    assert (a - b).abs().max() <= 1e-10
    assert (b - vector(network(torch.float64, 0))).norm() > 0.1 * b.norm()


def further(row, seed):
    """In float32: our median distance to seven runs of torch's, over their largest from each other. Torch's have the
    examples of every batch in other orders, half of them on its foreach path."""
    runs = [theirs(row, torch.float32, seed, foreach=False)]
    runs += [theirs(row, torch.float32, seed, within, foreach=bool(within % 2)) for within in range(1, 7)]
    own = max((a - b).norm() for a, b in itertools.combinations(runs, 2))
    found = ours(row, torch.float32, seed)
    return (torch.stack([(found - run).norm() for run in runs]).median() / own).item()


@pytest.mark.slow
@every
def test_is_no_further_from_torch_than_torch_from_itself(row):
    """On the average over seeds: rounding is amplified along a run, so that one seed's distances are a draw."""
    assert statistics.geometric_mean(further(row, seed) for seed in range(4)) <= 1
