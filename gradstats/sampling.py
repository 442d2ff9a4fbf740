"""Statistics of a part of what is seen, at a part of the price.

    attach(model, every=k)       in the first window and every k-th after it (turns.py)
    attach(model, fraction=f)    over m = max(1, round(f B)) of the B examples of every backward pass, S, drawn without
                                 replacement and independently of everything else

An example is in S with probability m/B, so that for any function h of one contribution

    sum_b h(c_b)  ~  B/m sum_{b in S} h(c_b)        without bias, with variance B^2 (1/m - 1/B) Var_b h(c_b)

where Var_b is the unbiased variance over the batch. The gradient is that of all examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.statistics import SecondMoment, Variance
from gradstats.window import BlockStatistic, Statistic


@dataclass(frozen=True)
class Sampling:
    """What `attach` was told. Raises: GradstatsError for numbers out of range."""

    every: int = 1
    fraction: float = 1.0
    generator: torch.Generator | None = None  # None only where nothing is drawn

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise GradstatsError(f"every={self.every!r}: statistics are gathered in every k-th window, k = 1, 2, ...")
        if isinstance(self.fraction, str | bool) or not 0 < self.fraction <= 1:
            raise GradstatsError(f"fraction={self.fraction!r}: the part of the examples is above 0 and at most 1")

    def check(self, granularity: str, statistics: Iterable[Statistic]) -> None:
        """Raises: GradstatsError for what cannot be gathered so."""
        if self.fraction < 1 and granularity != "example":
            raise GradstatsError(
                f"fraction={self.fraction:g} draws examples, and granularity={granularity!r} counts something else: "
                f"give one of them up"
            )
        for statistic in statistics:
            self.check_statistic(statistic)

    def check_statistic(self, statistic: Statistic) -> None:
        """Raises: GradstatsError for what a part of the examples does not estimate without bias."""
        sums = isinstance(statistic, BlockStatistic) and statistic.persistent
        if self.fraction < 1 and not sums and not isinstance(statistic, SecondMoment | Variance):
            raise GradstatsError(
                f"{statistic.name!r} is not a sum over examples with an entry for every element, so that a part of "
                f"them (fraction={self.fraction:g}) does not estimate it without bias. Use attach(..., every=k), in "
                f"whose windows every statistic is exact"
            )

    def draw(self, n: int) -> Tensor:
        """S (m,): indices of m of n examples, in order."""
        m = max(1, round(self.fraction * n))
        assert self.generator is not None
        return torch.randperm(n, generator=self.generator, device=self.generator.device)[:m].sort().values
