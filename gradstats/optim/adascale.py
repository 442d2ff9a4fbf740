"""AdaScale: SGD whose learning rate grows with the batch by as much as the noise of the gradient allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradstats.noise_scale import estimate
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.bound import wide_norms
from gradstats.optim.parts import Age, Part
from gradstats.optim.update import Update, Values
from gradstats.units import Slides

# The averages of sigma^2 and mu^2 remember as many batches of the tuned size.
HORIZON = 1000
# What is known of the whole model, in every group: averages of |G|^2 and tr Sigma, the examples behind them, and tau.
OF_MODEL = ("gradient_squared", "trace", "measured", "iterations")


@dataclass(frozen=True)
class AdaScaleUpdate(Update):
    """torch's heavy ball, or the mean gradient itself."""

    momentum: bool
    coupled: bool

    statistics = ("second_moment",)

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def bounded(self) -> str | None:
        return "momentum_buffer" if self.momentum else None

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        return {"momentum_buffer": k.momentum * x.momentum_buffer + x.m} if self.momentum else {}

    def change(self, x: Values, k: Values) -> Tensor:
        return k.step * (x.momentum_buffer if self.momentum else x.m)


class AdaScale(ExampleOptimizer):
    """AdaScale SGD: tuned at one batch size, and at others counted in iterations of that.

    With m the mean gradient of a batch of B = S batch_size examples, |G|^2 and tr Sigma the unbiased estimates of
    gradstats/noise_scale.py from it, over all parameters of the optimizer, and w = B / min(E, 1000 batch_size), the
    first thousand tuned batches' mean and then an average of this horizon:

        mu^2    <- (1 - w) mu^2    + w |G|^2
        sigma^2 <- (1 - w) sigma^2 + w tr Sigma / batch_size
        r        = (sigma^2 + mu^2) / (sigma^2/S + mu^2)        the gain: 1 at S = 1, S where all is noise
        tau     <- tau + r
        v       <- momentum v + m
        p       <- p (1 - lr weight_decay)^r - r lr v

    A step is worth r iterations at batch_size, and tau counts them: `optimizer.iterations`, which a schedule of lr goes
    by. At B = batch_size this is torch.optim.SGD's trajectory. For comparison: the learning curve stays against tau,
    not against examples, and momentum is one of steps, whatever their B.

    A batch of one example says nothing of the noise: the averages stay, and before there are any, r = S.

    Arguments:
        lr, momentum, weight_decay, maximize: torch.optim.SGD's, as tuned at `batch_size`.
        batch_size: the batch size at which those values were tuned.
        decoupled_weight_decay: False adds weight_decay p to every example's gradient, as torch.optim.SGD does; mu^2 is
            that of the loss without it.
        max_norm: bounds the norm of (1 - momentum) v over all parameters of the optimizer. None does not clip.
        compiled: see ExampleOptimizer.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if the gradient was changed
        after the backward pass (clip with max_norm).

    Source: Johnson, Agrawal, Gu & Guestrin 2020, "AdaScale SGD", arXiv:2007.05105; its estimators and their averages:
    appendix B.3. There, the gradients of S batches of the tuned size are compared, S an integer above 1; here those of
    single examples, for any B. fairscale floors each estimate at 0, which makes the averages too large; here, it is the
    averages that are floored.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,  # torch.optim.SGD's next is dampening, which this has not
        weight_decay: float = 0.0,
        batch_size: float = 256,
        decoupled_weight_decay: bool = True,
        max_norm: float | None = None,
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_norm": max_norm,
            "maximize": maximize,
        }
        super().__init__(params, options, compiled)

    @property
    def iterations(self) -> float:
        """tau."""
        return self.param_groups[0]["iterations"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for name in OF_MODEL:
            self.param_groups[-1].setdefault(name, self.param_groups[0].get(name, 0.0))

    def statistics(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return AdaScaleUpdate.statistics

    def needs_gradient(self, group: Mapping[str, Any]) -> bool:
        return True

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> AdaScaleUpdate:
        return AdaScaleUpdate(
            group["momentum"] != 0, coupled=group["weight_decay"] != 0 and not group["decoupled_weight_decay"]
        )

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        return {"momentum": group["momentum"], "bounded_scale": 1 - group["momentum"]}

    def values_at(self, group: Mapping[str, Any], batch_size: float) -> dict[str, Any]:
        """At the gain that the noise measured so far would give."""
        gain = self.gain(group, batch_size)
        return {"lr": gain * group["lr"], "momentum": group["momentum"], "gain": gain}

    def prepare(self, parts: list[Part]) -> None:
        self.measure([part for part in parts if part.age.batch_size > 1])
        gains = []
        for part in parts:
            gain = self.gain(part.group, part.age.batch_size)
            part.scalars["step"] = gain * part.group["lr"]
            if not part.update.coupled:
                part.scalars["decay"] = (1 - part.group["lr"] * part.group["weight_decay"]) ** gain
            gains.append(gain)
        for group in self.param_groups:
            group["iterations"] += max(gains)

    def measure(self, parts: list[Part]) -> None:
        """Moves the averages of |G|^2 and tr Sigma."""
        if not parts:
            return
        b = max(part.age.batch_size for part in parts)
        estimates = torch.stack([noise(part) for part in parts]).sum(0).tolist()
        for group in self.param_groups:
            group["measured"] += b
            w = Slides(HORIZON * group["batch_size"]).weight(b, group["measured"])
            for name, value in zip(("gradient_squared", "trace"), estimates, strict=True):
                group[name] += w * (value - group[name])

    def gain(self, group: Mapping[str, Any], b: float) -> float:
        """r."""
        scale = b / group["batch_size"]
        mu2, sigma2 = max(group["gradient_squared"], 0.0), max(group["trace"], 0.0) / group["batch_size"]
        return (sigma2 + mu2) / (sigma2 / scale + mu2) if mu2 > 0 else scale


def noise(part: Part) -> Tensor:
    """|G|^2 and tr Sigma of the part's parameters (2,)."""
    k = part.scalars
    mean_squared = torch.stack(wide_norms(part.columns["gradient"])).double().square().sum()
    sums = torch.stack([s.sum(dtype=torch.float64) for s in part.columns["sum_of_squares"]]).sum()
    mean_squared, sums = part.total(torch.stack([mean_squared, sums]))
    return torch.stack(
        estimate(k["mean_scale"] ** 2 * mean_squared, k["second_moment_scale"] * sums, part.age.batch_size)
    ).cpu()
