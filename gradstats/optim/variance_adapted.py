"""Experimental. Steps shortened where the mean gradient does not stand out of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradstats.optim.adam import BatchInvariantAdam
from gradstats.optim.noise import NoiseScaled, ScaledUpdate, share
from gradstats.optim.parts import Age
from gradstats.optim.sgd import BatchInvariantSGD
from gradstats.optim.update import Update, Values, moved


@dataclass(frozen=True)
class VarianceAdaptedUpdate(ScaledUpdate):
    """An update times gamma = m~^2 / (m~^2 + s2~/R)."""

    @property
    def added(self) -> tuple[str, ...]:
        return ("variance",)

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        _, sigma2 = self.split(x, k)
        return super().averages(x, k) | {"variance": moved(x.variance, sigma2, k.noise_weight)}

    def factor(self, x: Values, k: Values) -> Tensor:
        return share(self.running_average(x, k).square(), x.variance.clamp(min=0) * k.inverse_noise_reference)


class VarianceAdapted(NoiseScaled):
    """What both have in common."""

    def scaled(self, group: Mapping[str, Any], inner: Update, single: bool) -> VarianceAdaptedUpdate:
        return VarianceAdaptedUpdate(inner, single, self.statistics(group), inner.coupled)

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        r = group["reference_batch_size"]
        if r is None or r == "tuned":
            r = group["batch_size"]
        return super().scalars(group, age, update) | {"inverse_noise_reference": 1 / r}


class VarianceAdaptedSGD(VarianceAdapted, BatchInvariantSGD):
    """Experimental. SGD whose step is shortened, element by element, where the gradient is mostly noise.

    With s2 the unbiased variance of a batch's per-example gradients, R the reference batch size, u the change that
    BatchInvariantSGD makes and m~ the average that its max_norm bounds (m without momentum), elementwise:

        s2~   <- (1 - w) s2~ + w s2          w = (1 - rho^B)/(1 - rho^E), rho = noise_beta^(1/batch_size)
        gamma  = m~^2 / (m~^2 + s2~/R)
        p     <- p (1 - lr weight_decay)^(B/batch_size) - gamma u

    gamma is the factor that brings gamma g closest to the true gradient, for g with mean m~ and the variance of the
    mean of R examples. It is 1 without noise, and does not depend on B where m~ is over many batches. B = 1 has no
    variance: `gradstats.optim.noise` says how it is estimated there.

    From M-SVAG it takes gamma. M-SVAG knows no per-example gradients: it estimates the variance of the batch gradient
    from its scatter over time, (v~ - m~^2)/(1 - rho(beta, t)) with v~ the average of m^2, which counts the drift of the
    gradient as noise, and shortens by the variance of m~ itself, rho(beta, t) times that. From t = 0 on,

        rho(beta, t) = (1 - beta)(1 + beta^(t+1)) / ((1 + beta)(1 - beta^(t+1)))

    Here the variance is measured within the batch, and R = batch_size (1 + momentum)/(1 - momentum) is M-SVAG's
    shortening after the start. Its m~ is that of momentum = dampening = 0.9, average="debiased_ewma".

    Arguments:
        noise_beta: decay of s2~ per batch_size examples.
        reference_batch_size: R >= 1, or "tuned", which None means too: `batch_size`. inf is BatchInvariantSGD.
        All others: those of BatchInvariantSGD.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if the gradient was changed
        after the backward pass (clip with max_norm).

    Source: Balles & Hennig 2018, "Dissecting Adam: The Sign, Magnitude and Variance of Stochastic Gradients",
    arXiv:1705.07774, M-SVAG.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        noise_beta: float = 0.99,
        reference_batch_size: float | str | None = None,
        **options: Any,
    ):
        noise_options = {"noise_beta": noise_beta, "reference_batch_size": reference_batch_size}
        super().__init__(params, *args, noise_options=noise_options, **options)


class VarianceAdaptedAdam(VarianceAdapted, BatchInvariantAdam):
    """Experimental. Adam whose step is shortened, element by element, where the gradient is mostly noise.

    The factor of VarianceAdaptedSGD on the step of BatchInvariantAdam, with Adam's m~ and its R:

        p <- p (1 - lr weight_decay)^(B/batch_size) - gamma (B/batch_size) lr m~ / (sqrt(s) + eps)

    Adam's denominator shortens by the root of gamma already, since s is about m~^2 + s2~/R: an element moves by nearly
    (B/batch_size) lr gamma^1.5. It keeps one buffer more than Adam.

    Arguments:
        noise_beta: decay of s2~ per batch_size examples.
        All others: those of BatchInvariantAdam; reference_batch_size is R in gamma too.

    Raises, Source: as VarianceAdaptedSGD and BatchInvariantAdam.
    """

    def __init__(self, params: Any, *args: Any, noise_beta: float = 0.99, **options: Any):
        super().__init__(params, *args, noise_options={"noise_beta": noise_beta}, **options)
