"""How far noise keeps stochastic gradient descent from a minimum: of a quadratic, and of a loss on real data.

Around a minimum with Hessian H and covariance Sigma of per-example gradients, descent at eta on batches of B examples,
drawn with replacement, is stationary with an excess loss that each eigenvector of H adds its part to:

    excess = sum_i h_i / 2 variance_i = eta/(2B) sum_i Sigma_ii / (2 - eta h_i)        about eta tr Sigma / (4 B)

Source: Mandt et al. 2017, arXiv:1704.04289, 4.1; Smith & Le 2018, arXiv:1710.06451, for eta/B as the temperature.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from experiments.data import Split
from experiments.estimate import Array
from experiments.laboratory.problem import data_of
from experiments.laboratory.quadratic import stationary_variance

RELAXATIONS = 3  # time constants of the slowest direction that pass before measuring; it lasts as long
NOTED = 100  # values of the loss in a run
LARGEST_GRADIENT = 1e-6  # at what counts as a minimum


def relaxed(rate: float, curvature: float) -> int:
    """Steps after which a start is forgotten in a direction of this curvature."""
    return math.ceil(RELAXATIONS / (rate * curvature))


def quadratic_variance(
    rate: float, batch_size: int, curvature: float, noise: float, repetitions: int, seed: int
) -> float:
    """Mean square of the distance from the minimum of h beta^2 / 2, over repetitions and time, where each example's
    gradient has noise of variance noise^2; torch's SGD."""
    generator = torch.Generator().manual_seed(seed)
    beta = torch.zeros(repetitions, requires_grad=True)
    optimizer = torch.optim.SGD([beta], lr=rate)
    # Beyond eta h = 1 the error changes its sign at every step, and shrinks by eta h - 1.
    before = relaxed(rate, curvature * min(1.0, 2 / (rate * curvature) - 1))
    squares = []
    for t in range(2 * before):
        z = noise * torch.randn(batch_size, repetitions, generator=generator)
        optimizer.zero_grad()
        (curvature * beta.square() / 2 + z * beta).mean(0).sum().backward()
        optimizer.step()
        if t >= before:
            squares.append(beta.detach().square().mean())
    return float(torch.stack(squares).mean())


def examples(problem: str) -> Split:
    """Flat, in float64: what is left of a loss near its minimum is small."""
    train = data_of(problem).train
    return Split(train.x.flatten(1).double(), train.y)


class Well:
    """Softmax regression with a penalty on all parameters, which makes the loss strongly convex, at its minimum.

    loss = mean cross-entropy + penalty/2 ||theta||^2
    """

    def __init__(self, problem: str, penalty: float) -> None:
        self.data, self.penalty = examples(problem), penalty
        self.model = nn.Linear(self.data.x.shape[1], int(self.data.y.max()) + 1).double()
        for p in self.parameters:
            nn.init.zeros_(p)
        descent = torch.optim.LBFGS(
            self.parameters, max_iter=1000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            self.model.zero_grad()
            loss = self.loss(self.data.x, self.data.y)
            loss.backward()
            return loss.item()

        descent.step(closure)
        largest = max(float(p.grad.abs().max()) for p in self.parameters if p.grad is not None)
        if not largest < LARGEST_GRADIENT:
            raise RuntimeError(f"no minimum was found at penalty {penalty}: the gradient is {largest:.0e}")

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in self.parameters]).sum()
        return F.cross_entropy(self.model(x), y) + self.penalty / 2 * penalty

    @torch.no_grad()
    def value(self) -> float:
        return self.loss(self.data.x, self.data.y).item()


def well_excess(problem: str, penalty: float, rate: float, batch_size: int, seed: int) -> float:
    """Mean over time of the loss of torch's SGD at a constant learning rate, above that of the minimum."""
    well = Well(problem, penalty)
    lowest = well.value()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(well.parameters, lr=rate)
    before = relaxed(rate, penalty)
    found = []
    for t in range(2 * before):
        chosen = torch.randint(len(well.data), (batch_size,), generator=generator)
        optimizer.zero_grad()
        well.loss(well.data.x[chosen], well.data.y[chosen]).backward()
        optimizer.step()
        if t >= before and t % max(1, before // NOTED) == 0:
            found.append(well.value() - lowest)
    return float(np.mean(found))


def well_at_minimum(problem: str, penalty: float) -> dict[str, list[float] | float]:
    """Eigenvalues of the Hessian, the noise Sigma_ii along their eigenvectors, and tr Sigma by gradstats."""
    well = Well(problem, penalty)
    x, y = well.data.x, well.data.y
    theta = torch.cat([p.detach().flatten() for p in well.parameters])
    classes, features = well.model.weight.shape

    def loss(theta: Tensor) -> Tensor:
        logits = x @ theta[: classes * features].view(classes, features).T + theta[classes * features :]
        return F.cross_entropy(logits, y) + penalty / 2 * theta.square().sum()

    # jacrev of grad rather than hessian, whose forward mode imports what torch deprecates
    curvatures, axes = torch.linalg.eigh(torch.func.jacrev(torch.func.grad(loss))(theta))
    gradients = gradstats.per_example_gradients(well.model, F.cross_entropy, x, y)
    rows = torch.cat([gradients[name].flatten(1) for name, _ in well.model.named_parameters()], dim=1)
    noise = ((rows - rows.mean(0)) @ axes).square().mean(0)
    found = gradstats.compute(well.model, F.cross_entropy, x, y, statistics=["noise_scale"])
    return {
        "curvatures": curvatures.tolist(),
        "noise": noise.tolist(),
        "trace": float(found.totals["noise_scale"].trace),
    }


def expected_excess(curvatures: Array, noise: Array, rate: float, batch_size: int) -> float:
    """The sum above."""
    variances = [stationary_variance(rate, s2 / batch_size, h) for s2, h in zip(noise, curvatures, strict=True)]
    return float((curvatures / 2 * variances).sum())
