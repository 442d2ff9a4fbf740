"""The private step by gradstats and by Opacus: that they are equal, and what either takes.

DPOptimizer reads gradients of all examples, which GradSampleModule keeps; DPOptimizerFastGradientClipping is Opacus'
ghost clipping, of two backward passes like ours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.laboratory.private.accounting import poisson
from experiments.laboratory.private.step import PrivateGradient
from experiments.laboratory.private.training import generators
from experiments.laboratory.problem import build

OURS, KEPT, GHOST = "gradstats", "Opacus", "Opacus, ghost clipping"
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
WARM_UP = 3  # steps that are not timed

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Private:
    """What all are given."""

    base: str
    lr: float
    sigma: float
    max_norm: float
    batch_size: int
    seed: int

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return BASES[self.base](model.parameters(), lr=self.lr)

    def noise(self) -> torch.Generator:
        return generators(self.seed)[1]


def ours(model: nn.Module, private: Private) -> Step:
    optimizer = private.optimizer(model)
    gradient = PrivateGradient(model, private.max_norm, private.sigma, private.batch_size, private.noise())

    def step(x: Tensor, y: Tensor) -> None:
        gradient.backward(x, y)
        optimizer.step()

    return step


def kept(model: nn.Module, private: Private) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        private.optimizer(model),
        noise_multiplier=private.sigma,
        max_grad_norm=private.max_norm,
        expected_batch_size=private.batch_size,
        generator=private.noise(),
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            # The input of the first layer needs no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()

    return step


def ghost(model: nn.Module, private: Private) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=private.max_norm, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        private.optimizer(model),
        noise_multiplier=private.sigma,
        max_grad_norm=private.max_norm,
        expected_batch_size=private.batch_size,
        generator=private.noise(),
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            criterion(wrapped(x), y).backward()
        optimizer.step()

    return step


PEERS: dict[str, Callable[[nn.Module, Private], Step]] = {OURS: ours, KEPT: kept, GHOST: ghost}


def difference(
    problem: str, base: str, lr: float, sigma: float, max_norm: float, batch_size: int, steps: int, seed: int
) -> dict[str, float]:
    """max |p - p'| / max |p' - p0| over all elements, of our parameters p and those p' of each of Opacus' steps, from
    the same p0, by the same batches and the same noise, in float64."""
    private = Private(base, lr, sigma, max_norm, batch_size, seed)
    models: dict[str, nn.Module] = {}
    for name in ("start", *PEERS):
        data, models[name] = build(problem, seed)
        models[name].double()
    made = [make(models[name], private) for name, make in PEERS.items()]
    for indices in poisson(len(data.train), batch_size / len(data.train), steps, generators(seed)[0]):
        for step in made:
            step(data.train.x[indices].double(), data.train.y[indices])
    flat = {name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in models.items()}
    return {
        name: float((flat[OURS] - flat[name]).abs().max() / (flat[name] - flat["start"]).abs().max())
        for name in PEERS
        if name != OURS
    }


def seconds(
    problem: str, base: str, lr: float, sigma: float, max_norm: float, batch_size: int, steps: int, seed: int
) -> dict[str, list[float]]:
    """Of single steps in float32, all in turn, so that what else the machine does meets them alike."""
    private = Private(base, lr, sigma, max_norm, batch_size, seed)
    made: dict[str, Step] = {}
    for name, make in PEERS.items():
        data, model = build(problem, seed)
        made[name] = make(model, private)
    found: dict[str, list[float]] = {name: [] for name in PEERS}
    for i in range(WARM_UP + steps):
        indices = torch.arange(i * batch_size, (i + 1) * batch_size) % len(data.train)
        x, y = data.train.x[indices], data.train.y[indices]
        for name, step in made.items():
            started = time.perf_counter()
            step(x, y)
            if i >= WARM_UP:
                found[name].append(time.perf_counter() - started)
    return found
