"""Steps by the private gradient g~: whatever is computed from it is as private as it is.

    DP-SGD      p -= lr g~
    DP-Adam     p -= lr m^ / (sqrt(v^) + eps)                               m^, v^ averages of g~ and g~^2, debiased
    DP-AdamBC   p -= lr m^ / (sqrt(max(v^ - Phi, floor Phi)) + eps)         Phi = (sigma C / B)^2, the noise in g~^2

Tang et al. 2023, arXiv:2312.14334: without noise E v^ would be less by Phi, which is known. There the floor is a number
by itself; in units of Phi it means the same for every noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

SGD, ADAM, CORRECTED = "DP-SGD", "DP-Adam", "DP-AdamBC"
METHODS = (SGD, ADAM, CORRECTED)
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's


class Method(Protocol):
    def step(self) -> None: ...

    def second_moment(self) -> float:
        """The mean of v^ over all elements; not a number where the method has none."""
        ...


class SGDStep:
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.optimizer = torch.optim.SGD(parameters, lr=lr)

    def step(self) -> None:
        self.optimizer.step()

    def second_moment(self) -> float:
        return float("nan")


class AdamStep:
    """torch's Adam where the noise variance is 0."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, noise_variance: float, floor: float) -> None:
        self.parameters, self.lr, self.noise_variance, self.floor = list(parameters), lr, noise_variance, floor
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - BETAS[0])
            v.lerp_(p.grad.square(), 1 - BETAS[1])
            signal = (self._debiased(v) - self.noise_variance).clamp(min=self.floor * self.noise_variance)
            p.addcdiv_(m / (1 - BETAS[0] ** self.steps), signal.sqrt() + EPS, value=-self.lr)

    def _debiased(self, v: Tensor) -> Tensor:
        return v / (1 - BETAS[1] ** self.steps)

    def second_moment(self) -> float:
        return float(torch.cat([self._debiased(v).flatten() for v in self.v]).mean())


def build(method: str, parameters: Iterable[nn.Parameter], lr: float, noise_variance: float, floor: float) -> Method:
    made: dict[str, Callable[[], Method]] = {
        SGD: lambda: SGDStep(parameters, lr),
        ADAM: lambda: AdamStep(parameters, lr, 0.0, 0.0),
        CORRECTED: lambda: AdamStep(parameters, lr, noise_variance, floor),
    }
    return made[method]()
