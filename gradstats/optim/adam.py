"""Batch-size-invariant Adam: time in examples, second moment from per-example gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.moment import MomentUpdate, check_moment, combines, moment_of, moment_scalars, reads
from gradstats.optim.options import one_of
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values, moved
from gradstats.units import average, decay_of

DENOMINATORS = ("adam", "slides")


@dataclass(frozen=True, kw_only=True)
class AdamUpdate(MomentUpdate):
    """m~ and s, and the one over the root of the other."""

    amsgrad: bool = False
    denominator: str = "adam"

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else []), *self.moment.buffers)

    @property
    def bounded(self) -> str:
        return "exp_avg"

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        new = self.moment.averages(x, k)
        new["exp_avg"] = moved(x.exp_avg, x.m, k.w1)
        if self.amsgrad and not self.waits:  # torch keeps the largest of averages that start from zero
            s = self.moment.floor(new["exp_avg_sq"], x | new, k)
            new["max_exp_avg_sq"] = torch.maximum(x.max_exp_avg_sq, s * k.bias_correction)
        return new

    def change(self, x: Values, k: Values) -> Tensor:
        s = x.max_exp_avg_sq / k.bias_correction if self.amsgrad else self.moment.floor(x.exp_avg_sq, x, k)
        s = self.moment.above(s, x.exp_avg)
        if self.denominator == "slides":
            return k.step * x.exp_avg / (1 + s.sqrt() / k.eps)
        return k.step * x.exp_avg / (s.sqrt() + k.eps)


class BatchInvariantAdam(ExampleOptimizer):
    """Adam, tuned once at one batch size and used at any.

    With m the mean gradient and v_R = m^2 + (1/R - 1/B) s2 the second moment at the reference batch size R, both of a
    batch of B examples, and w = (1 - rho^B)/(1 - rho^E), rho = beta^(1/batch_size), E the examples that the parameter
    has seen:

        m~ <- (1 - w1) m~ + w1 m
        s  <- (1 - w2) s  + w2 v_R
        p  <- p (1 - lr weight_decay)^(B/batch_size) - (B/batch_size) lr m~ / (sqrt(s) + eps)

    At B = R = batch_size this is torch.optim.AdamW's trajectory (Adam's for weight_decay = 0); at any other B the
    learning curve against examples stays, until the step itself grows too long for the loss surface.

    R > B cannot be had from one batch (nor can R > 1 from one example): `gradstats.optim.moment` says how mu^2 is
    estimated there. This keeps two more buffers, q~ and the mean gradient before, or with the other estimators only q~;
    all other settings keep Adam's two. One batch smaller than R, such as the last of an epoch, makes them for good:
    DataLoader(..., drop_last=True) avoids it.

    Arguments:
        lr, betas, eps, weight_decay, amsgrad, maximize: torch.optim.AdamW's, as tuned at `batch_size`. The default
            weight_decay is 0.
        batch_size: the batch size at which those values were tuned.
        reference_batch_size: R >= 1, inf, or "tuned", which None means too: `batch_size`. R = 1 is the mean of squared
            per-example gradients.
        source: what s averages: "second_moment" v_R; "variance" s2/R; "mean_square" v_inf; "squared_batch_mean" m^2,
            ordinary Adam's, which depends on the batch size and needs no statistics. Where statistics are of a part
            (attach(..., every=k, fraction=f)), "variance" is refused.
        estimator: of mu^2 where R > B: "previous", "running_average" or "in_batch".
        average: of units.py, for both: "debiased_ewma" as above, "ewma", "mean", or "slides", w = B / min(E, N) with
            N = batch_size / (1 - beta).
        denominator: "adam" as above, or "slides", lr m~ / (1 + sqrt(s)/eps): lr is then that of SGD, which is its limit
            for a large eps.
        decoupled_weight_decay: False adds weight_decay p to every example's gradient, as torch.optim.Adam does.
        max_norm: bounds the norm of m~ over all parameters of the optimizer, unlike clipping of the batch gradient,
            which depends on the batch size. None does not clip.
        compiled: see ExampleOptimizer.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if squares are combined with
        the gradient (R > 1, or the variance) and it was changed after the backward pass (clip with max_norm). A step
        with lr = 0 before any backward only allocates state, as distributed checkpointing wants.

    Source: D. McAllester, TTIC 31230 lecture slides, "SGD, Momentum, RMSProp, Adam"; Kingma & Ba 2015, Algorithm 1;
    decoupled weight decay: Loshchilov & Hutter 2019, Algorithm 2; AMSGrad: Reddi et al. 2018, Algorithm 2.
    """

    checks = {"denominator": one_of(DENOMINATORS)}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        batch_size: float = 256,
        reference_batch_size: float | str | None = None,
        average: str = "debiased_ewma",
        max_norm: float | None = None,
        maximize: bool = False,
        *,
        amsgrad: bool = False,
        source: str = "second_moment",
        estimator: str = "previous",
        denominator: str = "adam",
        decoupled_weight_decay: bool = True,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "reference_batch_size": reference_batch_size,
            "average": average,
            "max_norm": max_norm,
            "maximize": maximize,
            "amsgrad": amsgrad,
            "source": source,
            "estimator": estimator,
            "denominator": denominator,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, options, compiled)

    @classmethod
    def in_examples(
        cls,
        params: Any,
        lr: float | Tensor = 4e-6,
        horizons: tuple[float, float] = (2560, 256_000),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reference_batch_size: float | str = 1,
        **options: Any,
    ) -> Self:
        """The slides' parametrisation: lr an example, and horizons N in examples, rho = 1 - 1/N.

        The same as values tuned at batch size 1 with betas = 1 - 1/N; `options` are those of the class.
        """
        betas = decay_of(horizons[0]), decay_of(horizons[1])
        return cls(params, lr, betas, eps, weight_decay, 1, reference_batch_size, **options)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_moment(group)

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("second_moment",) if reads(group) else ()

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        return combines(group)

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> AdamUpdate:
        moment = moment_of(group, batch_size, state)
        return AdamUpdate(
            moment,
            statistics=self.statistics(group) if moment.reads else (),
            coupled=group["weight_decay"] != 0 and not group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            denominator=group["denominator"],
        )

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        assert isinstance(update, AdamUpdate)
        b, e, tuned = age.batch_size, age.examples, group["batch_size"]
        first, second = (average(group["average"], beta, tuned) for beta in group["betas"])
        return moment_scalars(group, update.moment, age, second, (first, e - b)) | {
            "w1": first.weight(b, e),
            "step": b / tuned * group["lr"],
            "eps": group["eps"],
            "bias_correction": second.bias_correction(age.covered),
        }
