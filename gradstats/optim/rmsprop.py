"""Batch-size-invariant RMSprop: time in examples, second moment from per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, maximum

from gradstats.errors import GradstatsError
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.moment import (
    MomentUpdate,
    check_moment,
    combines,
    moment_of,
    moment_scalars,
    reads,
    reference_of,
)
from gradstats.optim.options import one_of
from gradstats.optim.parts import Age
from gradstats.optim.sgd import heavy_ball
from gradstats.optim.update import Update, Values, moved
from gradstats.units import average


@dataclass(frozen=True, kw_only=True)
class RMSpropUpdate(MomentUpdate):
    """s, and the mean gradient over its root, or a velocity that takes pushes of this."""

    centered: bool
    squared: bool  # exponent 1
    eps_inside: bool
    momentum: bool
    averaged: bool  # m~ is kept

    @property
    def buffers(self) -> tuple[str, ...]:
        averaged = ["exp_avg"] if self.averaged else []
        return ("exp_avg_sq", *averaged, *(["momentum_buffer"] if self.momentum else []), *self.moment.buffers)

    @property
    def younger(self) -> tuple[str, ...]:
        return (*(["exp_avg"] if self.averaged else []), *super().younger)

    @property
    def bounded(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        new = self.moment.averages(x, k)
        if self.averaged:
            new["exp_avg"] = moved(x.exp_avg, x.m, k.w1)
        if self.momentum:
            push = k.push * x.m / self.denominator(x | new, k)
            new["momentum_buffer"] = k.coasting * (x.momentum_buffer + push)
        return new

    def change(self, x: Values, k: Values) -> Tensor:
        if self.momentum:
            return k.step * k.bounded_scale * x.momentum_buffer
        return k.step * x.m / self.denominator(x, k)

    def denominator(self, x: Values, k: Values) -> Tensor:
        s = self.moment.floor(x.exp_avg_sq, x, k)
        if self.centered:
            mu2 = x.exp_avg.square()
            s = s - mu2
            if self.moment.floored:
                s = maximum(s, k.inverse_reference * x.exp_avg_q - k.share_of_mean * mu2)
            s = s.clamp(min=0)
        s = self.moment.above(s, x.m)
        if self.eps_inside:
            s = s + k.eps
        root = s if self.squared else s.sqrt()
        return root if self.eps_inside else root + k.eps


class BatchInvariantRMSprop(ExampleOptimizer):
    """RMSprop, tuned once at one batch size and used at any.

    With m the mean gradient and v_R = m^2 + (1/R - 1/B) s2 the second moment at the reference batch size R, both of a
    batch of B examples, k = B/batch_size, w = 1 - rho^B, and rho = alpha^(1/batch_size):

        s  <- (1 - w) s  + w v_R
        m~ <- (1 - w) m~ + w m                  if centered: s - m~^2 takes the place of s below
        u  = m / (s^exponent + eps)             or m / (s + eps)^exponent, with eps_inside
        p  <- p (1 - lr weight_decay)^k - k lr u

    or, with momentum, the heavy ball of BatchInvariantSGD that u pushes:

        v  <- v + k u
        p  <- p (1 - lr weight_decay)^k - lr (1 - momentum^k) / (1 - momentum) v
        v  <- momentum^k v

    At B = R = batch_size this is torch.optim.RMSprop's trajectory; there, s is square_avg and m~ grad_avg.

    With exponent 1/2 the step has the unit of lr, whatever the parameter's; with exponent 1, lr times g/sigma^2 has the
    parameter's own unit if lr has the loss's, so that the training of c u in place of p does not depend on c (eps = 0).

    For R > B, `gradstats.optim.moment` says how mu^2 is estimated; this keeps two more buffers. What is centered
    is then floored at (q~ - m~^2)/R.

    Arguments:
        lr, alpha, eps, weight_decay, momentum, centered, maximize: torch.optim.RMSprop's, as tuned at `batch_size`.
        batch_size: the batch size at which those values were tuned.
        reference_batch_size, source, estimator: as in BatchInvariantAdam. source="variance", s2/R, is the variance
            within a batch; that of `centered`, s - m~^2, is over time as well.
        exponent: 0.5 or 1.
        eps_inside: whether eps is added before the power, as Graves does.
        average: of units.py, for s and m~: "ewma", which starts from zero, "debiased_ewma", "mean" or "slides".
        decoupled_weight_decay: False adds weight_decay p to every example's gradient, as torch.optim.RMSprop does.
        max_norm: bounds the norm over all parameters of the optimizer: of the step, in units of u, with momentum; of m,
            which depends on the batch size, without. None does not clip.
        compiled: see ExampleOptimizer.

    Raises: GradstatsError for `centered` with source="variance" or R = inf; MissingStatistic by `step` for a gradient
        without statistics; LifetimeError if squares are combined with the gradient (R > 1, the variance, centered) and
        it was changed after the backward pass (clip with max_norm).

    Source: Tieleman & Hinton 2012, Coursera lecture 6.5; centered, with momentum: Graves 2013, arXiv:1308.0850;
    g/sigma^2: D. McAllester, TTIC 31230 lecture slides, "SGD, Momentum, RMSProp, Adam".
    """

    checks = {"exponent": one_of((0.5, 1))}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        batch_size: float = 256,
        *,
        reference_batch_size: float | str | None = None,
        source: str = "second_moment",
        estimator: str = "previous",
        exponent: float = 0.5,
        eps_inside: bool = False,
        average: str = "ewma",
        decoupled_weight_decay: bool = True,
        max_norm: float | None = None,
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "batch_size": batch_size,
            "reference_batch_size": reference_batch_size,
            "source": source,
            "estimator": estimator,
            "exponent": exponent,
            "eps_inside": eps_inside,
            "average": average,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_norm": max_norm,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    @classmethod
    def in_examples(
        cls,
        params: Any,
        lr: float | Tensor = 4e-5,
        horizons: tuple[float, float] = (1, 25_600),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reference_batch_size: float | str = 1,
        **options: Any,
    ) -> Self:
        """The slides' parametrisation: lr an example, in total, and horizons in examples of the momentum, 1 for none,
        and of s.

        The same as values tuned at batch size 1: lr/N and momentum = 1 - 1/N with N the first horizon, alpha = 1 - 1/N
        with the second. Decoupled decay is lr weight_decay an example, whatever N; `options` are those of the class.
        """
        if not all(n >= 1 for n in horizons):
            raise GradstatsError(f"horizons are numbers of examples, at least 1; got {horizons}")
        momentum, alpha = 1 - 1 / horizons[0], 1 - 1 / horizons[1]
        if options.get("decoupled_weight_decay", True):
            weight_decay *= horizons[0]
        values = (lr / horizons[0], alpha, eps, weight_decay, momentum)
        return cls(params, *values, batch_size=1, reference_batch_size=reference_batch_size, **options)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_moment(group)
        if group["centered"] and (group["source"] == "variance" or reference_of(group) == math.inf):
            raise GradstatsError(
                "centered=True subtracts the squared mean, which source='variance' has not and R = inf is nothing but: "
                "give one of them up"
            )

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("second_moment",) if reads(group) else ()

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        return combines(group) or (group["centered"] and reads(group))

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> RMSpropUpdate:
        moment, centered = moment_of(group, batch_size, state), group["centered"]
        return RMSpropUpdate(
            moment,
            statistics=self.statistics(group) if moment.reads else (),
            coupled=group["weight_decay"] != 0 and not group["decoupled_weight_decay"],
            centered=centered,
            squared=group["exponent"] == 1,
            eps_inside=group["eps_inside"],
            momentum=group["momentum"] != 0,
            averaged=centered or moment.infinite or moment.partner == "exp_avg" or "exp_avg" in state,
        )

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        assert isinstance(update, RMSpropUpdate)
        moment, ages = update.moment, age.of_buffers
        b, momentum, k = age.batch_size, group["momentum"], age.batch_size / group["batch_size"]
        kind = average(group["average"], group["alpha"], group["batch_size"])

        before = ages["exp_avg"] - b if update.averaged else 0
        scalars = moment_scalars(group, moment, age, kind, (kind, before))
        scalars |= {"step": k * group["lr"], "eps": group["eps"]}
        if update.averaged:
            scalars["w1"] = kind.weight(b, ages["exp_avg"])
        if moment.floored:
            scalars["share_of_mean"] = 1 / reference_of(group)
        if update.momentum:
            scalars |= heavy_ball(momentum, k) | {"push": k, "step": k / (1 - momentum) * group["lr"]}
        return scalars
