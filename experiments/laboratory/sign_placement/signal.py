"""How much of a step goes along the gradient, for each place of the sign.

With g_b an example's gradient under a draw of the model's dropout, mu its mean, and B examples in a batch:

    before     u = mean_b sign(g_b)            after     u = sign(mean_b g_b)

both averaged over a horizon of N examples, as momentum does, which leaves B/(2N - B) of the variance; and

    average    u = sign of the mean of 2N - B examples, about as noisy as the running average with that horizon

    signal(u) = <mu, E u>^2 / (|mu|^2 E|u|^2)

is the square of the cosine between gradient and step, where the step's length counts with its noise: 1 for a step along
the gradient.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.data import Split
from experiments.laboratory.along import along
from experiments.laboratory.problem import build
from experiments.schemas.optimizer import BatchInvariantSignSGDConfig
from experiments.study import default_optimizer

MASKS = 8  # draws of dropout, of the whole training set
STEPS = 128  # batches whose signs are averaged
LONG = 16  # averages of as many examples as the horizon has


def signals(
    problem: str, method: str, lr: float, batch_size: int, examples: int, warmup: int, looks: int, sizes: str, seed: int
) -> list[dict[str, dict[str, float]]]:
    """At so many moments of a run, evenly spaced: the signal by place, and by batch size of `sizes`, "16 64"."""
    optimizer = dataclasses.replace(default_optimizer(method), lr=lr)
    assert isinstance(optimizer, BatchInvariantSignSGDConfig)
    horizon = 1 / (1 - optimizer.momentum ** (1 / optimizer.batch_size))
    counts = [examples * (i + 1) // looks // batch_size * batch_size for i in range(looks)]
    found = []
    for _, data, model, _ in along(problem, optimizer, batch_size, warmup, seed, counts):
        with torch.random.fork_rng(devices=[]):  # the run's dropout goes on where it was
            _, copy = build(problem, seed)
            copy.load_state_dict(model.state_dict())
            found.append(measured(copy, data.train, [int(size) for size in sizes.split()], horizon))
    return found


def measured(model: nn.Module, data: Split, sizes: list[int], horizon: float) -> dict[str, dict[str, float]]:
    """Of a model in training mode."""
    draws = torch.Generator().manual_seed(0)

    def drawn(size: int, count: int) -> tuple[Tensor, Tensor]:
        """Gradients (count, P) of batches, and the means of their examples' signs."""
        rows = (torch.randint(len(data), (size,), generator=draws) for _ in range(count))
        found = [gradient(model, data, chosen, stats) for chosen in rows]
        return torch.stack([g for g, _ in found]), torch.stack([n for _, n in found])

    found: dict[str, dict[str, float]] = {"before": {}, "after": {}, "average": {}}
    with gradstats.attach(model, "sign_mean") as stats:
        mu = torch.stack([gradient(model, data, torch.arange(len(data)), stats)[0] for _ in range(MASKS)]).mean(0)
        for B in sizes:
            whole = round(2 * horizon - B)
            gradients, signs = drawn(B, STEPS)
            found["before"][str(B)] = signal(mu, signs, B / whole)
            found["after"][str(B)] = signal(mu, gradients.sign(), B / whole)
            found["average"][str(B)] = signal(mu, drawn(whole, LONG)[0].sign(), 1.0)
    return found


def gradient(model: nn.Module, data: Split, rows: Tensor, stats: gradstats.Handle) -> tuple[Tensor, Tensor]:
    """Of the mean loss of these examples (P,), and the mean of their signs."""
    model.zero_grad()
    F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
    parameters = list(model.parameters())
    mean = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return mean.double(), torch.cat([stats.sign_mean[p].flatten() for p in parameters]).double()


def signal(mu: Tensor, draws: Tensor, left: float) -> float:
    """<mu, E u>^2 / (|mu|^2 (|E u|^2 + left tr Var u)) from draws of u (K, P), of whose variance so much is left.

    The mean of K draws has a K-th of their variance itself, which does not count.
    """
    expected, variance = draws.mean(0), draws.var(0).sum()
    length = expected.square().sum() + (left - 1 / len(draws)) * variance
    return float((mu @ expected).square() / (mu.square().sum() * length))
