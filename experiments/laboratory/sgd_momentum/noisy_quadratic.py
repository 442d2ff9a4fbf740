"""SGD with momentum on (theta - x)^2 / 2 with x normal of variance 1, in closed form.

Each element of the parameter is a run of its own. An example is informative with some probability, and has no gradient
otherwise, as one that is masked or already learnt: the mean gradient of a batch of which k are informative is
(k theta - sqrt(k) z) / B with z normal. lr is an example's total effect, and a horizon is a number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from experiments.optimizers import stepper
from gradstats.optim import BatchInvariantSGD

POINTS = 100  # of a curve, log-spaced


def momentum_of(horizon: float, batch_size: int) -> float:
    """A batch's, of an average that remembers so many examples."""
    return (1 - 1 / horizon) ** batch_size


def torch_sgd(p: Tensor, lr: float, horizon: float, batch_size: int, dampened: bool = False) -> SGD:
    """The slides' rule lr_torch = B lr0 / N_g, with N_g = 1 / (1 - momentum) batches."""
    momentum = momentum_of(horizon, batch_size)
    if dampened:
        return SGD([p], batch_size * lr, momentum, dampening=momentum)
    return SGD([p], batch_size * lr * (1 - momentum), momentum)


def ours(average: str) -> Callable[[Tensor, float, float, int], Optimizer]:
    return lambda p, lr, horizon, batch_size: BatchInvariantSGD.in_examples([p], lr, horizon, average=average)


METHODS: dict[str, Callable[[Tensor, float, float, int], Optimizer]] = {
    "torch": torch_sgd,
    "dampened": lambda p, lr, horizon, batch_size: torch_sgd(p, lr, horizon, batch_size, dampened=True),
    "plain": lambda p, lr, horizon, batch_size: SGD([p], batch_size * lr),
    "heavy_ball": ours("heavy_ball"),
    "ewma": ours("ewma"),
    "debiased_ewma": ours("debiased_ewma"),
    "slides": ours("slides"),
}


def parameter(size: int, start: float) -> Tensor:
    return torch.full((size,), start, dtype=torch.float64, requires_grad=True)


class Gradients:
    """Of batches at a parameter, drawn anew for each."""

    def __init__(self, size: int, batch_size: int, informative: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.size, self.batch_size, self.informative = size, batch_size, informative

    def draw(self) -> tuple[Tensor, Tensor]:
        """Slope and noise: the gradient is slope theta - noise."""
        k = self.random.binomial(self.batch_size, self.informative, size=self.size)
        noise = np.sqrt(k) * self.random.standard_normal(self.size)
        return torch.from_numpy(k / self.batch_size), torch.from_numpy(noise / self.batch_size)


def descend(
    method: str,
    batch_size: int,
    tuned_batch_size: int,
    lr: float,
    horizon: float,
    informative: float,
    steps: int,
    replicas: int,
    seed: int,
) -> dict[str, Any]:
    """From theta = 1. The optimizer is that of `tuned_batch_size`: where it is torch's and batch_size another one, its
    lr and momentum are kept, as torch would.

    mean: of theta over replicas, after the counts in `examples`; variance: over replicas, mean over the second half of
    all steps; of_average: that of the running average, None where none is kept.
    """
    p = parameter(replicas, 1.0)
    optimizer = METHODS[method](p, lr, horizon, tuned_batch_size)
    step = stepper(optimizer, batch_size)
    gradients = Gradients(replicas, batch_size, informative, seed)
    shown = {int(i) for i in np.unique(np.geomspace(1, steps, POINTS).round())}
    examples, mean = [0], [1.0]
    variances: list[float] = []
    of_average: list[float] = []
    for i in range(1, steps + 1):
        slope, noise = gradients.draw()
        p.grad = slope * p.detach() - noise
        step()
        if i in shown:
            examples.append(i * batch_size)
            mean.append(float(p.detach().mean()))
        if i > steps // 2:
            variances.append(float(p.detach().var()))
            if "exp_avg" in (state := optimizer.state[p]):
                of_average.append(float(state["exp_avg"].var()))
    return {
        "examples": examples,
        "mean": mean,
        "variance": float(np.mean(variances)),
        "of_average": float(np.mean(of_average)) if of_average else None,
    }


def difference(methods: str, batch_size: int, lr: float, horizon: float, steps: int, replicas: int, seed: int) -> float:
    """The largest difference of theta between two methods, joined by a plus, over all steps and elements."""
    first, second = methods.split("+")
    places = [parameter(replicas, 1.0) for _ in (first, second)]
    optimizers = [METHODS[name](p, lr, horizon, batch_size) for name, p in zip((first, second), places, strict=True)]
    steppers = [stepper(optimizer, batch_size) for optimizer in optimizers]
    gradients = Gradients(replicas, batch_size, 1.0, seed)
    largest = 0.0
    for _ in range(steps):
        slope, noise = gradients.draw()
        for p, step in zip(places, steppers, strict=True):
            p.grad = slope * p.detach() - noise
            step()
        largest = max(largest, float((places[0] - places[1]).detach().abs().max()))
    return largest


def total_effect(method: str, batch_size: int, mixed: bool, horizon: float, horizons: int) -> dict[str, list[float]]:
    """How far a batch moves the parameter sooner or later, in units of its examples' lr g.

    By `examples`, those seen before the batch. All gradients but its own are zero. mixed: a quarter of the batch size,
    the batch size, and four times that, in turns.
    """
    sizes = [batch_size // 4, batch_size, 4 * batch_size] if mixed else [batch_size]
    steps = max(1, round(horizons * horizon / (sum(sizes) / len(sizes))))
    p = parameter(steps, 0.0)
    optimizer = METHODS[method](p, 1.0, horizon, batch_size)
    batches = [sizes[i % len(sizes)] for i in range(steps)]
    # Until nothing of the last batch's gradient is left: rho^E = e^-40.
    rest = [batch_size] * math.ceil(40 * horizon / batch_size)
    for i, size in enumerate([*batches, *rest]):
        p.grad = torch.zeros_like(p)
        if i < steps:
            p.grad[i] = 1.0
        stepper(optimizer, size)()
    effect = -p.detach() / torch.tensor(batches)
    return {"examples": np.cumsum([0, *batches[:-1]]).tolist(), "effect": effect.tolist()}


def examples_to(level: float, curve: dict[str, Any]) -> float:
    """Where the mean first falls to the level, interpolated between points of the curve; nan if it never does."""
    mean, examples = np.array(curve["mean"]), np.array(curve["examples"], dtype=float)
    below = np.flatnonzero(mean <= level)
    if len(below) == 0:
        return math.nan
    after = int(below[0])
    return float(np.interp(-level, -mean[after - 1 : after + 1], examples[after - 1 : after + 1]))
