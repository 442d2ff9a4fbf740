"""Signal and noise of each element of the gradient, and steps that are scaled by them.

From a batch of B examples with mean gradient m and second moment q, unbiased for mu^2 and for the variance sigma^2:

    mu2 = m^2 - s2/B        sigma2 = q - mu2        that is s2, the variance of the batch

One example has no variance. For B = 1, mu2 = m m~, the product with the running average before it, without that one's
start at zero, and 0 where there is none: all is noise then.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values
from gradstats.statistics import reference_weight
from gradstats.units import average, decay_of, forgotten


def noise_scalars(b: int, e: int, beta: float, batch_size: float) -> dict[str, float]:
    """The numbers of mu2 = noise_product m partner + noise_square q, and the weight of its running average."""
    square = 0.0 if b == 1 else reference_weight(b, math.inf)
    weight = average("debiased_ewma", beta, batch_size).weight(b, e)
    return {"noise_product": 1 - square, "noise_square": square, "noise_weight": weight}


def split(x: Values, k: Values, partner: Tensor) -> tuple[Tensor, Tensor]:
    """mu2 and sigma2 of a batch; `partner` is m, or for B = 1 the running average before it."""
    mu2 = k.noise_product * x.m * partner + k.noise_square * x.second_moment
    return mu2, x.second_moment - mu2


def share(part: Tensor, rest: Tensor) -> Tensor:
    """part / (part + rest) for numbers from 0 on; 1 where both are 0."""
    tiny = torch.finfo(part.dtype).tiny
    return (part + tiny) / (part + tiny + rest)


@dataclass(frozen=True)
class ScaledUpdate(Update):
    """Another update, whose change is multiplied by a factor of signal and noise."""

    inner: Update
    single: bool  # B = 1
    statistics: tuple[str, ...]
    coupled: bool

    @property
    @abstractmethod
    def added(self) -> tuple[str, ...]:
        """The buffers beside the other's."""

    @abstractmethod
    def factor(self, x: Values, k: Values) -> Tensor:
        """What the change is multiplied by, given the new buffers."""

    @property
    def buffers(self) -> tuple[str, ...]:
        return (*self.inner.buffers, *self.added)

    @property
    def younger(self) -> tuple[str, ...]:
        return self.inner.younger

    @property
    def bounded(self) -> str | None:
        return self.inner.bounded

    def running_average(self, x: Values, k: Values) -> Tensor:
        """m~ of the other before max_norm; m where it keeps none."""
        if self.bounded is None:
            return x.m / vars(k).get("clip", 1.0)
        return getattr(x, self.bounded) * vars(k).get("bounded_scale", 1.0)

    def split(self, x: Values, k: Values) -> tuple[Tensor, Tensor]:
        """mu2 and sigma2."""
        if self.single and self.bounded is None:
            return torch.zeros_like(x.m), x.second_moment
        return split(x, k, k.noise_unbias * self.running_average(x, k) if self.single else x.m)

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        return self.inner.averages(x, k)

    def change(self, x: Values, k: Values) -> Tensor:
        return self.inner.change(x, k) * self.factor(x, k)


class NoiseScaled(ExampleOptimizer):
    """Mixed into an optimizer, it scales the optimizer's steps: class Scaled(NoiseScaled, BatchInvariantSGD)."""

    def __init__(self, params: Any, *args: Any, noise_options: dict[str, Any], **options: Any):
        super().__init__(params, *args, **options)
        self.defaults |= noise_options
        for group in self.param_groups:
            for name, value in noise_options.items():
                group.setdefault(name, value)
            self.check(group)

    @classmethod
    def in_examples(cls, params: Any, *args: Any, noise_horizon: float = 25_600, **options: Any) -> Self:
        """As the optimizer's own, with the horizon of the averages of noise in examples too."""
        return super().in_examples(params, *args, noise_beta=decay_of(noise_horizon), **options)  # type: ignore[misc]

    @abstractmethod
    def scaled(self, group: Mapping[str, Any], inner: Update, single: bool) -> ScaledUpdate:
        """The update around the optimizer's own."""

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("second_moment",)

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> Any:
        return self.scaled(group, super().update(group, batch_size, state), batch_size == 1)  # type: ignore[safe-super]

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        assert isinstance(update, ScaledUpdate)
        of_optimizer = super().scalars(group, age, update.inner)  # type: ignore[safe-super]
        noise = noise_scalars(age.batch_size, age.examples, group["noise_beta"], group["batch_size"])
        return of_optimizer | noise | {"noise_unbias": self.unbias(group, age.examples - age.batch_size)}

    def unbias(self, group: Mapping[str, Any], before: int) -> float:
        """What makes up for the start of m~ at zero, after so many examples."""
        if before == 0 or group["average"] not in ("ewma", "heavy_ball"):
            return 1.0
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        return 1 / forgotten(beta ** (1 / group["batch_size"]), before)
