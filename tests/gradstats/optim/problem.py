"""A classifier small enough for hundreds of runs, and the loop that trains it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def problem(dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)
    return model, torch.randn(512, 6, dtype=dtype), torch.randint(0, 3, (512,))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, optimizer, x, y, sizes, after=lambda: None, before=lambda: None, sign=1, **step):
    """One step on every batch of a stream; the parameters afterwards."""
    start = 0
    for b in sizes:
        rows = torch.arange(start, start + b) % len(x)
        start += b
        model.zero_grad()
        (sign * F.cross_entropy(model(x[rows]), y[rows])).backward()
        before()
        optimizer.step(**step)
        after()
    return vector(model)
