"""A private run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.data import Split
from experiments.laboratory.private.accounting import noise_multiplier, poisson, spent, steps_of
from experiments.laboratory.private.methods import build as build_method
from experiments.laboratory.private.step import PrivateGradient
from experiments.laboratory.problem import build, loss_of, predictions

NOISE_STREAM = 1  # of the seeds, apart from those of the initial model


def accuracy(model: nn.Module, split: Split) -> float:
    return float((predictions(model, split.x).argmax(1) == split.y).double().mean())


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """That of the examples, and that of the noise."""
    states = np.random.SeedSequence([seed, NOISE_STREAM]).generate_state(2)
    order, noise = (torch.Generator().manual_seed(int(state)) for state in states)
    return order, noise


def trained(
    problem: str,
    method: str,
    lr: float,
    epsilon: float | None,
    delta: float,
    max_norm: float,
    batch_size: int,
    epochs: float,
    floor: float,
    octave: float,
    seed: int,
) -> dict[str, Any]:
    """Training loss and held-out accuracy of the last model, and the epsilon spent; without privacy nothing is
    clipped, and there is no noise. noise_share: of what DP-Adam's second moment is, the part that is noise; clipped:
    of all examples."""
    data, model = build(problem, seed)
    rate = batch_size / len(data.train)
    steps = steps_of(epochs, rate)
    sigma = noise_multiplier(epsilon, delta, rate, steps)
    order, noise = generators(seed)
    gradient = PrivateGradient(model, math.inf if epsilon is None else max_norm, sigma, batch_size, noise)
    stepper = build_method(method, model.parameters(), lr, gradient.noise_variance, floor)
    initial = loss_of(model, data.train)
    clipped = []
    for indices in poisson(len(data.train), rate, steps, order):
        gradient.backward(data.train.x[indices], data.train.y[indices])
        stepper.step()
        clipped.append(gradient.clipped)
    loss = loss_of(model, data.train)
    return {
        # No loss counts for more than the initial model's, and one that is not finite for that.
        "loss": min(loss, initial) if math.isfinite(loss) else initial,
        "test_accuracy": accuracy(model, data.test),
        "epsilon": None if epsilon is None else spent(sigma, delta, rate, steps),
        "sigma": sigma,
        "steps": steps,
        "clipped": float(np.mean(clipped)),
        "noise_share": gradient.noise_variance / stepper.second_moment(),
    }
