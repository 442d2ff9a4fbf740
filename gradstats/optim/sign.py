"""Batch-size-invariant signSGD: the sign after, within or before the averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.options import one_of
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values, moved
from gradstats.units import average, decay_of

PLACEMENTS = ("running_average", "batch", "example")


@dataclass(frozen=True)
class SignUpdate(Update):
    """The running average of gradients or signs, and what is made of it."""

    placement: str
    statistics: tuple[str, ...]

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        value = x.m
        if self.placement == "batch":
            value = x.m.sign()
        elif self.placement == "example":
            value = x.sign_mean
        return {"exp_avg": moved(x.exp_avg, value, k.w)}

    def change(self, x: Values, k: Values) -> Tensor:
        return k.step * (x.exp_avg.sign() if self.placement == "running_average" else x.exp_avg)


class BatchInvariantSignSGD(ExampleOptimizer):
    """signSGD, with the sign at one of three places, tuned once at one batch size and used at any.

    With m the mean gradient of a batch of B examples, n the mean of their signs, n = (1/B) sum_b sign(g_b), and
    w = (1 - rho^B)/(1 - rho^E), rho = momentum^(1/batch_size), E the examples that the parameter has seen:

        "running_average"   m~ <- (1 - w) m~ + w m            u = sign(m~)     Signum
        "batch"             u <- (1 - w) u + w sign(m)                         signSGD, for momentum = 0
        "example"           u <- (1 - w) u + w n

        p <- p (1 - lr weight_decay)^(B/batch_size) - (B/batch_size) lr u

    The sign of a batch's mean gets surer as B grows, so that "batch" depends on the batch size; the other two do not,
    as long as the horizon of m~ is longer than a batch. At B = batch_size "running_average" is Signum's trajectory,
    whose average from zero has the same sign. No element moves by more than lr in batch_size examples, so that there
    is nothing for a max_norm to bound.

    Arguments:
        lr, momentum, weight_decay, maximize: Signum's, as tuned at `batch_size`.
        batch_size: the batch size at which those values were tuned.
        placement: of the sign, as above. "example" needs attach(model, "sign_mean"); the others only the batch size.
        average: of units.py: "debiased_ewma" as above, "ewma", "mean" or "slides".
        compiled: see ExampleOptimizer.

    Raises: MissingStatistic by `step` for a gradient without sign_mean, where that is read.

    Source: Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems", arXiv:1802.04434 (signSGD
    and Signum). The placements, and why the sign belongs after the averaging: Roulet & Agarwala, arXiv:2510.00236.
    """

    checks = {"placement": one_of(PLACEMENTS)}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        batch_size: float = 256,
        *,
        placement: str = "running_average",
        average: str = "debiased_ewma",
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "placement": placement,
            "average": average,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    @classmethod
    def in_examples(cls, params: Any, lr: float | Tensor = 4e-7, horizon: float = 2560, **options: Any) -> Self:
        """lr an example, and a horizon of N examples. The same as values tuned at batch size 1 with momentum 1 - 1/N;
        `options` are those of the class."""
        return cls(params, lr, decay_of(horizon), batch_size=1, **options)

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sign_mean",) if group["placement"] == "example" else ()

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> SignUpdate:
        return SignUpdate(group["placement"], self.statistics(group))

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        tuned = group["batch_size"]
        weight = average(group["average"], group["momentum"], tuned).weight(age.batch_size, age.examples)
        return {"w": weight, "step": age.batch_size / tuned * group["lr"]}
