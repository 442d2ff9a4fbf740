"""Adam with squares of micro-batch gradients, and values that are linear in the number of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.parts import Age, Part
from gradstats.optim.update import Update, Values, moved


@dataclass(frozen=True)
class MicrobatchUpdate(Update):
    """Adam's, with weights that depend on the sizes of all steps before."""

    statistics = ("second_moment",)
    buffers = ("exp_avg", "exp_avg_sq")
    numbers = ("exp_avg_mass", "exp_avg_sq_mass")  # u, what part of an average does not stem from its start at zero
    bounded = "exp_avg"

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        return {
            "exp_avg": moved(x.exp_avg, x.m, k.w1),
            "exp_avg_sq": moved(x.exp_avg_sq, x.second_moment, k.w2),
        }

    def change(self, x: Values, k: Values) -> Tensor:
        return k.step * x.exp_avg / (x.exp_avg_sq.sqrt() + k.eps)


class MicrobatchAdamW(ExampleOptimizer):
    """The batch-size-invariant Adam of Wang & Aitchison: micro-batch gradients are squared, then averaged.

    With h_i the mean gradient of micro-batch i of M, m the mean of these, and weights that are linear in M, w =
    min(1, M/batch_size (1 - beta)):

        u  <- u + (1 - u) w                 for each of both averages: u = 1 - prod(1 - w) over all steps so far
        m~ <- (1 - w1/u1) m~ + w1/u1 m
        s  <- (1 - w2/u2) s  + w2/u2 (1/M) sum_i h_i^2
        p  <- p (1 - lr weight_decay)^(M/batch_size) - (M/batch_size) lr m~ / (sqrt(s) + eps)

    At M = batch_size = 1 this is torch.optim.AdamW's trajectory. At M = batch_size it is BatchInvariantAdam's at
    reference_batch_size=1, if both count micro-batches; elsewhere that leaves beta^(M/batch_size) of an average, this
    1 - M/batch_size (1 - beta): as much if that is close to 1, and nothing where it would be negative.

    It counts what `attach` counts as one, so that "step" and "examples" are micro-batches after

        gradstats.attach(model, engine="microbatch", granularity="microbatch", microbatch_size=b)

    where every backward pass is one, for any model, or with engine="fused", where it is b consecutive examples. With
    granularity="example", a micro-batch is one example.

    Arguments:
        lr, betas, eps, weight_decay, maximize: torch.optim.AdamW's, as tuned at `batch_size`.
        batch_size: the number of micro-batches a step at which those values were tuned; the paper's is 1.
        max_norm: bounds the norm of m~ over all parameters of the optimizer. None does not clip.
        compiled: see ExampleOptimizer.

    Raises: MissingStatistic by `step` for a gradient without statistics.

    Source: Wang & Aitchison 2024, "Batch size invariant Adam", arXiv:2402.18824. There u is 1 - beta^t, the same while
    M stays, and the decay 1 - M lr weight_decay, the same to first order.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        batch_size: float = 1,
        max_norm: float | None = None,
        maximize: bool = False,
        *,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "max_norm": max_norm,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return MicrobatchUpdate.statistics

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> MicrobatchUpdate:
        return MicrobatchUpdate()

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        return {"step": age.batch_size / group["batch_size"] * group["lr"], "eps": group["eps"]}

    def values_at(self, group: Mapping[str, Any], batch_size: float) -> dict[str, Any]:
        k = batch_size / group["batch_size"]
        return {"betas": tuple(max(0.0, 1 - k * (1 - beta)) for beta in group["betas"])}

    def prepare(self, parts: list[Part]) -> None:
        for part in parts:
            for name, weight, beta in zip(part.update.numbers, ("w1", "w2"), part.group["betas"], strict=True):
                w = min(1.0, part.age.batch_size / part.group["batch_size"] * (1 - beta))
                u = float(part.states[0][name])
                u += (1 - u) * w
                part.scalars[weight] = w / u
                for state in part.states:
                    state[name].fill_(u)
