"""The second moment at a reference batch size R, mu^2 + sigma^2/R, estimated from batches of B and averaged.

With m the mean gradient, q the second moment and s2 the unbiased variance of a batch, one batch has

    v_R = m^2 + (1/R - 1/B) s2        E v_R = mu^2 + sigma^2/R,  v_R >= 0 for R <= B

For R > B this is negative at times, and for B = 1 there is no variance. Then mu^2 is estimated by one of

    "previous"          v = q/R + (1 - 1/R) m m'     the product with the mean gradient of the batch before
    "running_average"   v = q/R + (1 - 1/R) m m~     the product with the running average before this batch: less noise,
                                                     and less than mu^2 while the gradient turns
    "in_batch"          v_R as it is, where B > 1

and the average s is floored at q~/R, which is valid since mu^2 + sigma^2/R >= (mu^2 + sigma^2)/R. For R = inf this
says nothing, and the floor is m~^2, so that no element moves by more than the learning rate. The default is chosen by
measurement: `python -m experiments.estimators`.

Where statistics are of a part of what is seen (attach(..., every=k, fraction=f)), s moves by the weight of all examples
since it last did, w = (1 - rho^D)/(1 - rho^E), D being B and the examples of batches without statistics, so that an
example keeps the weight of its horizon. What had a gradient only where nothing was gathered would be divided by 0: once
a batch or examples were missed, for good, the denominator takes max(s, m~^2) (RMSprop: m^2). "variance" is refused: its
estimates are below 0 at times, and what bounds a step by the mean would leave nothing of it.

Sources, other than mu^2 + sigma^2/R itself ("second_moment"): "variance" is sigma^2/R, "mean_square" is mu^2 (the same
as R = inf), and "squared_batch_mean" m^2, which is ordinary Adam's and depends on B. The family of preconditioners is
that of Roulet & Agarwala, arXiv:2510.00236.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.optim.parts import COVERED, Age
from gradstats.optim.update import Update, Values, moved, scaled
from gradstats.statistics import reference_weight
from gradstats.units import Average

SOURCES = ("second_moment", "variance", "mean_square", "squared_batch_mean")
ESTIMATORS = ("running_average", "previous", "in_batch")


@dataclass(frozen=True)
class Moment:
    """How one batch's v is formed and averaged: what of it is not a number."""

    reads: bool  # the second moment of the batch
    _: KW_ONLY
    partner: str | None = None  # m is multiplied by itself (None), by "exp_avg" or by "previous"
    floored: bool = False  # q~ is kept
    infinite: bool = False  # R = inf
    signed: bool = False  # single values, and so their average, can be negative
    remembers: bool = False  # m' is kept
    waits: bool = False  # the batch has no statistics: s and q~ stay
    misses: bool = False  # s may not have seen what m~ has, now or ever before

    @property
    def buffers(self) -> tuple[str, ...]:
        return (*(["exp_avg_q"] if self.floored else []), *(["previous"] if self.remembers else []))

    @property
    def younger(self) -> tuple[str, ...]:
        """Buffers that are made when a batch is first smaller than R."""
        return self.buffers

    def growth(self, name: str, batch_size: int, waiting: int) -> int:
        """See Update."""
        if name != "exp_avg_q":
            return batch_size
        return 0 if self.waits else batch_size + waiting

    def of_part(self, state: Mapping[str, Any], gathered: bool) -> Moment:
        """See Update: q~ begins with a batch that has statistics."""
        floored = self.floored and (gathered or "exp_avg_q" in state)
        return replace(self, floored=floored, waits=not gathered, misses=True)

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        """s, and what else is kept for it."""
        if self.waits:
            return {"previous": x.m} if self.remembers else {}
        partner = x.m
        if self.partner is not None:
            # Before the first batch there is no other: m^2, too large by sigma^2/B, and soon forgotten.
            partner = k.unbias * getattr(x, self.partner) + k.first * x.m
        v = scaled(x.m, k.product) * partner
        if self.reads:
            v = v + k.square * x.second_moment
        new = {"exp_avg_sq": moved(x.exp_avg_sq, v, k.w2)}
        if self.floored:
            new["exp_avg_q"] = moved(x.exp_avg_q, x.second_moment, k.w3)
        if self.remembers:
            new["previous"] = x.m
        return new

    def floor(self, s: Tensor, x: Values, k: Values) -> Tensor:
        """max(s, q~/R), or max(s, m~^2) for R = inf."""
        if self.floored:
            return torch.maximum(s, x.exp_avg_q * k.inverse_reference)
        if self.infinite:
            return torch.maximum(s, x.exp_avg.square())
        return s.clamp(min=0) if self.signed else s

    def above(self, s: Tensor, mean: Tensor) -> Tensor:
        """max(s, mean^2), where it may be 0 although there was a gradient."""
        return torch.maximum(s, mean.square()) if self.misses else s


@dataclass(frozen=True)
class MomentUpdate(Update):
    """An update that divides by the root of a second moment."""

    moment: Moment
    _: KW_ONLY
    statistics: tuple[str, ...] = ()
    coupled: bool = False

    @property
    def younger(self) -> tuple[str, ...]:
        return self.moment.younger

    def growth(self, name: str, batch_size: int, waiting: int) -> int:
        return self.moment.growth(name, batch_size, waiting)

    @property
    def waits(self) -> bool:
        return self.moment.waits

    @property
    def misses(self) -> bool:
        return self.moment.misses

    def of_part(self, state: Mapping[str, Any], gathered: bool) -> Self | None:
        if self.moment.signed:
            return None
        moment, statistics = self.moment.of_part(state, gathered), self.statistics if gathered else ()
        return replace(self, moment=moment, statistics=statistics)


def check_moment(group: Mapping[str, Any]) -> None:
    """Raises: GradstatsError for a second moment that is 0 whatever the gradients."""
    if group["source"] == "variance" and group["reference_batch_size"] == math.inf:
        raise GradstatsError("source='variance' is sigma^2/R, which is 0 for R = inf: give a finite R")


def reference_of(group: Mapping[str, Any]) -> float:
    """R."""
    if group["source"] == "mean_square":
        return math.inf
    r = group["reference_batch_size"]
    return group["batch_size"] if r is None or r == "tuned" else r


def reads(group: Mapping[str, Any]) -> bool:
    """Whether the second moment of the batch is read at all."""
    if group["source"] == "squared_batch_mean":
        return False
    return group["estimator"] == "in_batch" or group["source"] == "variance" or reference_of(group) != math.inf


def combines(group: Mapping[str, Any]) -> bool:
    """Whether it is combined with m^2."""
    return reads(group) and (group["source"] == "variance" or reference_of(group) != 1)


def moment_of(group: Mapping[str, Any], b: float, state: Mapping[str, Any]) -> Moment:
    """For a batch of b examples, and a parameter whose state has these entries."""
    if group["source"] == "squared_batch_mean":
        return Moment(reads=False, misses=COVERED in state)
    r, variance = reference_of(group), group["source"] == "variance"
    across = b == 1 if variance or group["estimator"] == "in_batch" else r > b
    across = across and not (r == 1 and not variance)
    partner = None
    if across:
        partner = "previous" if group["estimator"] == "previous" else "exp_avg"
    floored = not variance and r != math.inf and (r > b or "exp_avg_q" in state)
    alone = r == b > 1 and not variance and not floored  # v_B = m^2
    return Moment(
        reads=reads(group) and not alone,
        partner=partner,
        floored=floored,
        infinite=not variance and r == math.inf,
        signed=variance,
        remembers=partner == "previous" or "previous" in state,
        misses=COVERED in state,
    )


def moment_scalars(
    group: Mapping[str, Any],
    moment: Moment,
    age: Age,
    average: Average,
    mean: tuple[Average, int],
) -> dict[str, float]:
    """The numbers of `averages` and `floor`: v = product m partner + square q, and weights; `mean` is the average that
    m~ is, and how many examples it had seen before this batch."""
    r, b, ages = reference_of(group), age.batch_size, age.of_buffers
    if group["source"] == "squared_batch_mean":
        product, square = 1.0, 0.0
    elif group["source"] == "variance":
        square = (1.0 if moment.partner else b / (b - 1)) / r
        product = -square
    else:
        square = 1 / r if moment.partner or b == 1 else reference_weight(b, r)
        product = 1 - square
    before = ages["previous"] - b if moment.partner == "previous" else mean[1]
    scalars = {
        "product": product,
        "square": square,
        "first": float(before == 0),
        "unbias": 1 / mean[0].mass(before) if moment.partner == "exp_avg" and before else 1.0,
        "w2": average.weight(age.stands_for, age.covered),
        "inverse_reference": 1 / r,
    }
    if moment.floored:  # s may have started earlier than q~
        scalars["w3"] = average.weight(age.stands_for, ages["exp_avg_q"])
        scalars["inverse_reference"] *= average.mass(age.covered) / average.mass(ages["exp_avg_q"])
    return scalars
