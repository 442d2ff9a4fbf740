"""Experimental. SGD in which every element of the parameters has a batch size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.noise import noise_scalars, split
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values, moved
from gradstats.units import decay_of


@dataclass(frozen=True)
class QuenchingUpdate(Update):
    """mu2~ and s2~, and the mean gradient over as many examples as these ask for."""

    single: bool  # B = 1

    statistics = ("second_moment",)

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("exp_avg", "squared_mean", "variance")

    @property
    def bounded(self) -> str:
        return "exp_avg"

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        mu2, sigma2 = split(x, k, x.exp_avg if self.single else x.m)
        new = {
            "squared_mean": moved(x.squared_mean, mu2, k.noise_weight),
            "variance": moved(x.variance, sigma2, k.noise_weight),
        }
        w = (k.batches * self.rate(x | new, k)).clamp(max=1.0)  # B/n, at most 1
        w = k.of_all + (w - k.of_all).clamp(min=0)
        return new | {"exp_avg": x.exp_avg + w * (x.m - x.exp_avg)}

    def rate(self, x: Values, k: Values) -> Tensor:
        """batch_size/n, from the new averages."""
        tiny = torch.finfo(x.variance.dtype).tiny  # without signal and noise there is nothing to wait for
        own = (x.squared_mean.clamp(min=0) + tiny) / (x.variance.clamp(min=0) + tiny)
        return (own * k.tuned).clamp(max=1.0)

    def change(self, x: Values, k: Values) -> Tensor:
        return k.step * self.rate(x, k) * x.exp_avg


class QuenchingSGD(ExampleOptimizer):
    """Experimental. SGD in which an element moves as in batches so large that its gradient stands out of its noise.

    With s2 the unbiased variance of a batch's per-example gradients and mu2 = m^2 - s2/B the unbiased estimate of the
    squared mean gradient, both averaged with w = (1 - rho^B)/(1 - rho^E), rho = noise_beta^(1/batch_size), elementwise:

        n   = max(batch_size, s2~/mu2~)         the element's own batch size; inf where mu2~ <= 0
        w_n = B / min(E, max(B, n))
        m~ <- (1 - w_n) m~ + w_n m              the mean gradient over about n examples
        p  <- p (1 - lr weight_decay)^(B/batch_size) - (B/n) lr m~

    s2/mu2 is the noise scale of one element. In every n examples it moves by lr times the mean gradient over them, as
    in SGD with batches of n; where no gradient stands out of the noise it stands still, hence the name: quenched, where
    SGD goes on moving at random. Without noise, at B = batch_size, this is torch.optim.SGD's trajectory. The
    hard form of VarianceAdaptedSGD's gamma at R = batch_size is batch_size/n. B = 1 has no variance:
    `gradstats.optim.noise` says how it is estimated there.

    This is our reading of the per-parameter "quenching" batch size that D. McAllester (TTIC 31230) speaks of: we found
    no definition of his to follow.

    Arguments:
        lr, weight_decay, maximize: torch.optim.SGD's, as tuned at `batch_size`; weight decay is decoupled.
        batch_size: the batch size at which those values were tuned, and the smallest n.
        noise_beta: decay of s2~ and mu2~ per batch_size examples.
        max_norm: bounds the norm of m~ over all parameters of the optimizer. None does not clip.
        compiled: see ExampleOptimizer.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if the gradient was changed
        after the backward pass (clip with max_norm).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,  # torch.optim.SGD's next is momentum, which this has not
        weight_decay: float = 0.0,
        batch_size: float = 256,
        noise_beta: float = 0.99,
        max_norm: float | None = None,
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "noise_beta": noise_beta,
            "max_norm": max_norm,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    @classmethod
    def in_examples(cls, params: Any, lr: float | Tensor = 4e-5, noise_horizon: float = 25_600, **options: Any) -> Self:
        """lr an example, and a horizon of N examples for the noise. The same as values tuned at batch size 1 with
        noise_beta 1 - 1/N; `options` are those of the class."""
        return cls(params, lr, batch_size=1, noise_beta=decay_of(noise_horizon), **options)

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return QuenchingUpdate.statistics

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> QuenchingUpdate:
        return QuenchingUpdate(single=batch_size == 1)

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        b, e, tuned = age.batch_size, age.examples, group["batch_size"]
        numbers = {"batches": b / tuned, "of_all": b / e, "tuned": tuned, "step": b / tuned * group["lr"]}
        return numbers | noise_scalars(b, e, group["noise_beta"], tuned)
