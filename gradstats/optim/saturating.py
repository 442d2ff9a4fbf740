"""Experimental. Steps that stop growing with the batch where it is larger than the noise scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradstats.optim.adam import BatchInvariantAdam
from gradstats.optim.noise import NoiseScaled, ScaledUpdate, share
from gradstats.optim.options import Check, one_of
from gradstats.optim.parts import Age, Part
from gradstats.optim.sgd import BatchInvariantSGD
from gradstats.optim.update import Update, Values, moved
from gradstats.sums import accumulation_dtype

EXTENTS = ("model", "layer", "coordinate")
NUMBERS = ("gradient_squared", "trace")  # kept for every parameter, on its device


@dataclass(frozen=True)
class SaturatingUpdate(ScaledUpdate):
    """An update times a number, or each element of it by its own."""

    by_coordinate: bool = field(kw_only=True)

    @property
    def added(self) -> tuple[str, ...]:
        return ("squared_mean", "variance") if self.by_coordinate else ()

    @property
    def device_numbers(self) -> tuple[str, ...]:
        return () if self.by_coordinate else NUMBERS

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        new = super().averages(x, k)
        if self.by_coordinate:
            mu2, sigma2 = self.split(x, k)
            new["squared_mean"] = moved(x.squared_mean, mu2, k.noise_weight)
            new["variance"] = moved(x.variance, sigma2, k.noise_weight)
        return new

    def factor(self, x: Values, k: Values) -> Tensor:
        return saturating(x.squared_mean, x.variance, k.excess) if self.by_coordinate else k.factor


def saturating(gradient_squared: Tensor, trace: Tensor, excess: Any) -> Tensor:
    """The factor 1 / (1 + B/(k B_noise)), with excess = B/k."""
    return share(trace.clamp(min=0), gradient_squared.clamp(min=0) * excess)


class Saturating(NoiseScaled):
    """What both have in common. The running averages of |G|^2 and tr Sigma are kept parameter by parameter, as
    state["gradient_squared"] and state["trace"]; those of the model are their sums."""

    checks = {"saturation": Check(lambda k: k > 0), "over": one_of(EXTENTS)}

    def __init__(
        self,
        params: Any,
        *args: Any,
        saturation: float = 1.0,
        over: str = "model",
        noise_beta: float = 0.99,
        **options: Any,
    ):
        noise_options = {"saturation": saturation, "over": over, "noise_beta": noise_beta}
        super().__init__(params, *args, noise_options=noise_options, **options)

    def scaled(self, group: Mapping[str, Any], inner: Update, single: bool) -> SaturatingUpdate:
        by_coordinate = group["over"] == "coordinate"
        return SaturatingUpdate(inner, single, self.statistics(group), inner.coupled, by_coordinate=by_coordinate)

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        return super().scalars(group, age, update) | {"excess": age.batch_size / group["saturation"]}

    def prepare(self, parts: list[Part]) -> None:
        """Moves the averages of |G|^2 and tr Sigma, without waiting for the device, and gives every part its factor."""
        super().prepare(parts)
        of_model: list[tuple[Part, Tensor]] = []
        stepped: list[Part] = []
        for part in parts:
            if part.group["over"] == "coordinate":
                stepped.append(part)
                continue
            averages = moved_noise(part)  # (2, parameters)
            if part.group["over"] == "model":
                of_model.append((part, averages.sum(1)))
                stepped.append(part)
            else:
                factors = saturating(averages[0], averages[1], part.scalars["excess"])
                stepped += [alone(part, i, factor) for i, factor in enumerate(factors.unbind())]
        parts[:] = stepped
        if of_model:
            device = of_model[0][1].device
            total = torch.stack([averages.to(device, torch.float64) for _, averages in of_model]).sum(0)
            for part, _ in of_model:
                part.scalars["factor"] = saturating(total[0], total[1], part.scalars["excess"])


def moved_noise(part: Part) -> Tensor:
    """The running averages of |G|^2 and tr Sigma of each parameter, moved by this batch."""
    kept = [state[name] for name in NUMBERS for state in part.states]
    estimates = torch.stack(noise(part))
    averages = torch.lerp(torch.stack(kept).view_as(estimates), estimates, part.scalars["noise_weight"])
    torch._foreach_copy_(kept, averages.view(-1).unbind())
    return averages


def noise(part: Part) -> tuple[Tensor, Tensor]:
    """|G|^2 and tr Sigma of each parameter from this batch: mu2 and sigma2 of noise.py, summed over elements."""
    assert isinstance(part.update, SaturatingUpdate)
    k, columns, running = part.scalars, part.columns, part.update.bounded
    dtype = accumulation_dtype(columns["parameter"][0].dtype)

    def dot(a: str, b: str) -> Tensor:
        pairs = zip(columns[a], columns[b], strict=True)
        return part.total(torch.stack([torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype)) for x, y in pairs]))

    scale, l2 = k["mean_scale"], k["l2"] if part.update.coupled else 0.0
    product = scale**2 * dot("gradient", "gradient")
    q = k["second_moment_scale"] * part.total(torch.stack([sums.sum() for sums in columns["sum_of_squares"]]))
    if l2:
        pull = l2 * (2 * scale * dot("gradient", "parameter") + l2 * dot("parameter", "parameter"))
        product, q = product + pull, q + pull
    if part.update.single:
        product = torch.zeros_like(q)
        if running is not None:
            product = scale * dot("gradient", running) + (l2 * dot("parameter", running) if l2 else 0)
            product *= k["noise_unbias"] * k.get("bounded_scale", 1.0)
    mu2 = k["noise_product"] * product + k["noise_square"] * q
    return mu2, q - mu2


def alone(part: Part, i: int, factor: Tensor) -> Part:
    """One of the part's parameters as a part, with its factor."""
    columns = {name: [column[i]] for name, column in part.columns.items()}
    scalars = part.scalars | {"factor": factor}
    return replace(part, scalars=scalars, states=[part.states[i]], columns=columns)


class SaturatingSGD(Saturating, BatchInvariantSGD):
    """Experimental. SGD whose step stops growing with the batch where it is larger than the noise scale.

    A step of B examples is B times as long as that of one, until there is no more to average out. With |G|^2 the
    squared norm of the true gradient, tr Sigma the trace of the covariance of per-example gradients, both estimated
    without bias from every batch (gradstats/noise_scale.py) and averaged, and u the change made by BatchInvariantSGD:

        |G|^2~     <- (1 - w) |G|^2~ + w |G|^2               w = (1 - rho^B)/(1 - rho^E)
        tr Sigma~  <- (1 - w) tr Sigma~ + w tr Sigma         rho = noise_beta^(1/batch_size)
        B_noise     = tr Sigma~ / |G|^2~
        p          <- p (1 - lr weight_decay)^(B/batch_size) - u / (1 + B/(k B_noise))

    so that B lr0 becomes B lr0 / (1 + B/(k B_noise)): lr0 an example for B far below k B_noise, and the step of
    k B_noise examples for B far above. While |G|^2~ is not above 0 the step is whole; decay always is. B = 1 has no
    trace: `gradstats.optim.noise` says how it is estimated there.

    Arguments:
        saturation: k, in noise scales, the batch size at which the step is half; inf is BatchInvariantSGD.
        over: what one noise scale is of: the "model" (all parameters of the optimizer), a "layer" (each parameter
            tensor), or a "coordinate" (each element: s2~/mu2~, two buffers more).
        noise_beta: decay of the averages per batch_size examples.
        All others: those of BatchInvariantSGD.

    Raises: MissingStatistic by `step` for a gradient without statistics; LifetimeError if the gradient was changed
        after the backward pass (clip with max_norm).

    Source: the noise scale: McCandlish et al., arXiv:1812.06162, 2.2, whose largest useful step for a batch of B,
    eps_max / (1 + B_noise/B), grows as this one does, and A.1. The step in examples is ours.
    """


class SaturatingAdam(Saturating, BatchInvariantAdam):
    """Experimental. Adam whose step stops growing with the batch where it is larger than the noise scale.

    As SaturatingSGD, with u the change that BatchInvariantAdam makes, and its arguments besides saturation, over and
    noise_beta. The noise scale is that of the gradient, not of Adam's direction.

    Raises, Source: as SaturatingSGD and BatchInvariantAdam.
    """
