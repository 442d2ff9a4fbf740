"""The menu: what each statistic needs from the leaves and how raw sums become numbers.

Contributions add up over accumulation steps, so leaves only ever keep raw sums; scale and batch size enter here, once,
on reading.

    g_b = scale c_b          scale = B for a mean loss, 1 for a sum loss
    m   = scale/B sum c_b    mean gradient
    q   = scale^2/B sum c_b^2
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradstats.contribution import wide
from gradstats.errors import GradstatsError

# The raw sums of contribution.py, and whether each is shaped like the parameter or has one entry an example.
SUMS = {"sum_of_squares": "parameter", "squared_norms": "example"}


@dataclass(frozen=True)
class Window:
    """What was backpropagated since the gradient was last None.

    `sums` maps names of SUMS to raw sums of one parameter; `gradient` is sum_b c_b, that is p.grad.
    """

    sums: Mapping[str, Tensor]
    gradient: Tensor | None
    batch_size: int
    loss_reduction: str

    @property
    def scale(self) -> float:
        return float(self.batch_size) if self.loss_reduction == "mean" else 1.0

    @property
    def mean(self) -> Tensor:
        """m (*shape)."""
        if self.gradient is None:
            raise GradstatsError(
                "the mean gradient is needed, but p.grad is None: read this statistic before zero_grad()"
            )
        return wide(self.gradient) * (self.scale / self.batch_size)


class Statistic(ABC):
    """One entry of the menu."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    needs_gradient: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def read(window: Window) -> Tensor: ...


class SecondMoment(Statistic):
    """q = (1/B) sum_b g_b^2, elementwise (*shape). Units: gradient squared."""

    name = "second_moment"
    needs = ("sum_of_squares",)

    @staticmethod
    def read(window: Window) -> Tensor:
        return window.sums["sum_of_squares"] * (window.scale**2 / window.batch_size)


class Variance(Statistic):
    """s2 = B/(B-1) (q - m^2), the unbiased variance of g_b over examples, elementwise (*shape).

    Deviations g_b - m are not at hand in one pass. Where |m| is far above the spread, q - m^2 loses digits and can come
    out below zero, which no variance is: it is floored at 0. The error is small relative to q (float32 epsilon), not to
    s2.

    Raises: GradstatsError for B = 1, where the variance does not exist.
    """

    name = "variance"
    needs = ("sum_of_squares",)
    needs_gradient = True

    @staticmethod
    def read(window: Window) -> Tensor:
        b = window.batch_size
        if b < 2:
            raise GradstatsError("the variance over examples needs at least two examples; this batch has one")
        q = SecondMoment.read(window)
        return (q - window.mean.square()).mul_(b / (b - 1)).clamp_(min=0)


class Norms(Statistic):
    """||g_b||, Euclidean norm of each example's gradient (B,), in the order in which the examples were seen."""

    name = "norms"
    needs = ("squared_norms",)

    @staticmethod
    def read(window: Window) -> Tensor:
        return window.sums["squared_norms"].sqrt() * window.scale


STATISTICS: dict[str, type[Statistic]] = {s.name: s for s in (SecondMoment, Variance, Norms)}


def reference_weight(batch_size: float, reference_batch_size: float) -> float:
    """k for which v_R = (1 - k) m^2 + k q, of a batch of B > 1 examples.

    With s2 = B/(B-1) (q - m^2), the second moment at reference batch size R, v_R = m^2 + (1/R - 1/B) s2, is this
    interpolation at k = (B/R - 1)/(B - 1); E v_R = mu^2 + sigma^2/R. v_1 = q and v_B = m^2. v_R >= 0 for R <= B.
    """
    return (batch_size / reference_batch_size - 1) / (batch_size - 1)
