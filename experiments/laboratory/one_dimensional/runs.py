"""Stochastic gradient descent on (beta - y)^2 / 2, by torch's own optimizer."""

from __future__ import annotations

import numpy as np
import torch

from experiments.laboratory.quadratic import power_rates

LATE = 16  # whether an error still falls is judged over the last factor of so many steps


def counts(steps: int) -> list[int]:
    """Steps after which errors are noted: log-spaced, with those between which a fall is judged."""
    return sorted({*np.geomspace(1, steps, 24).round().astype(int).tolist(), steps // LATE, steps})


def gradient_at_minimum(batch_size: int, noise: float, repetitions: int, seed: int) -> float:
    """Mean over repetitions of the squared gradient of one batch, at the minimum of the true loss."""
    generator = torch.Generator().manual_seed(seed)
    beta = torch.zeros(repetitions, requires_grad=True)
    y = noise * torch.randn(batch_size, repetitions, generator=generator)
    ((beta - y).square() / 2).mean(0).sum().backward()
    assert beta.grad is not None
    return float(beta.grad.square().mean())


def descend(
    scale: float, power: float, batch_size: int, steps: int, noise: float, start: float, repetitions: int, seed: int
) -> dict[str, list[float]]:
    """torch's SGD at learning rates scale / t^power: mean and mean square over repetitions of the error, at `counts`.

    The minimum is at 0, and all repetitions start at the same distance from it.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = torch.full((repetitions,), start, requires_grad=True)
    optimizer = torch.optim.SGD([beta], lr=1.0)
    noted, mean, square = set(counts(steps)), [], []
    for t, rate in enumerate(power_rates(scale, power, steps).tolist(), 1):
        y = noise * torch.randn(batch_size, repetitions, generator=generator)
        optimizer.zero_grad()
        ((beta - y).square() / 2).mean(0).sum().backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if t in noted:
            mean.append(float(beta.detach().mean()))
            square.append(float(beta.detach().square().mean()))
    return {"mean": mean, "square": square}


def descend_without_noise(rate: float, steps: int, start: float, seed: int) -> list[float]:
    """The error before and after each step of torch's SGD on the same examples at every step, in float64."""
    y = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    beta = torch.nn.Parameter(y.mean() + start)
    optimizer = torch.optim.SGD([beta], lr=rate)
    errors = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        ((beta - y).square() / 2).mean().backward()
        optimizer.step()
        errors.append(float(beta.detach() - y.mean()))
    return errors
