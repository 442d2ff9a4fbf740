"""For twins: one parameter whose per-example gradients are plain to see, (p - x_b)^3, and SGD's running average g~."""

from __future__ import annotations

import torch
from torch import nn

from gradstats import attach

SIZES = [8, 8, 64, 1, 1, 3, 16, 1, 5, 128, 8, 2] * 3


class Quartic(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, x):
        return ((self.p - x) ** 4 / 4).sum(-1)


class Momentum:
    """g~ of BatchInvariantSGD, debiased or the heavy ball's."""

    def __init__(self, momentum, batch_size, average):
        self.rho, self.b0, self.average, self.e, self.kept = momentum ** (1 / batch_size), batch_size, average, 0, 0.0

    def before(self, b):
        """The estimate of the mean gradient before a batch of b."""
        if self.average == "debiased_ewma":
            return self.kept
        start = 1 - self.rho**self.e if self.e else 1  # of the zero that it started from
        return self.kept * (1 - self.rho**b) / (self.rho**b * b / self.b0) / start

    def after(self, b, m):
        self.e += b
        if self.average == "debiased_ewma":
            w = (1 - self.rho**b) / (1 - self.rho**self.e)
            self.kept = (1 - w) * self.kept + w * m
            return self.kept
        v = self.kept + b / self.b0 * m
        self.kept = self.rho**b * v
        return (1 - self.rho**b) / (b / self.b0) * v


def compare(make, twin, *statistics, sizes=SIZES, noise=1.0):
    """Steps an optimizer and its twin side by side; the parameters stay equal."""
    torch.manual_seed(0)
    model = Quartic()
    attach(model, *statistics)
    optimizer, twin = make(model.parameters()), twin(model.p.detach())
    for b in sizes:
        x = noise * torch.randn(b, 3, dtype=torch.float64) + torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
        expected = twin.step((model.p.detach() - x) ** 3)
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        assert (model.p - expected).abs().max() <= 1e-10
    return optimizer
