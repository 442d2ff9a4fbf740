"""Batch-size-invariant Lion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values, moved
from gradstats.units import average, decay_of, forgotten


@dataclass(frozen=True)
class LionUpdate(Update):
    """m~, and the sign of m~ before this batch mixed with m."""

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        return {"exp_avg": moved(x.exp_avg, x.m, k.w2)}

    def change(self, x: Values, k: Values) -> Tensor:
        return k.step * moved(x.before.exp_avg, x.m, k.w1).sign()


class BatchInvariantLion(ExampleOptimizer):
    """Lion, tuned once at one batch size and used at any.

    With m the mean gradient of a batch of B examples and rho = beta^(1/batch_size):

        c  <- rho1^B m~ + (1 - rho1^B) m
        p  <- p (1 - lr weight_decay)^(B/batch_size) - (B/batch_size) lr sign(c)
        m~ <- rho2^B m~ + (1 - rho2^B) m

    At B = batch_size this is Lion's trajectory. The sign of c is surer in a larger batch, by as much as m weighs in it:
    the smaller 1 - rho1^B, the less the learning curve depends on B. No element moves by more than lr in batch_size
    examples, so that there is nothing for a max_norm to bound. It reads no statistics, only the batch size.

    Arguments:
        lr, betas, weight_decay, maximize: Lion's, as tuned at `batch_size`.
        batch_size: the batch size at which those values were tuned.
        average: of units.py, for m~: "ewma" as above, which starts from zero as Lion's; "debiased_ewma", "mean" or
            "slides".
        compiled: see ExampleOptimizer.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        batch_size: float = 256,
        *,
        average: str = "ewma",
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "average": average,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    @classmethod
    def in_examples(
        cls, params: Any, lr: float | Tensor = 4e-7, horizons: tuple[float, float] = (2560, 25_600), **options: Any
    ) -> Self:
        """lr an example, and horizons of N examples. The same as values tuned at batch size 1 with betas 1 - 1/N;
        `options` are those of the class."""
        return cls(params, lr, (decay_of(horizons[0]), decay_of(horizons[1])), batch_size=1, **options)

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> LionUpdate:
        return LionUpdate()

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        b, tuned, (beta1, beta2) = age.batch_size, group["batch_size"], group["betas"]
        return {
            "w1": forgotten(beta1 ** (1 / tuned), b),
            "w2": average(group["average"], beta2, tuned).weight(b, age.examples),
            "step": b / tuned * group["lr"],
        }
