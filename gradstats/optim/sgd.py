"""Batch-size-invariant SGD: momentum whose memory is a number of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.optim.base import ExampleOptimizer
from gradstats.optim.options import one_of
from gradstats.optim.parts import Age
from gradstats.optim.update import Update, Values, moved
from gradstats.units import AVERAGES, average, forgotten

# A velocity is given up at this fraction of itself, which no step notices: less would underflow in float32.
REST = 1e-16


def heavy_ball(momentum: float, k: float, dampening: float = 0.0) -> dict[str, float]:
    """The numbers of a velocity v that takes pushes of size k (1 - dampening): `coasting`, what k batches of the tuned
    size leave of it, and `bounded_scale`, by which that much of v is the distance covered, over k (1 - dampening)
    / (1 - momentum)."""
    coasting = max(momentum**k, REST)
    return {"coasting": coasting, "bounded_scale": forgotten(momentum, k) / (coasting * k * (1 - dampening))}


@dataclass(frozen=True)
class SGDUpdate(Update):
    """The mean gradient, a velocity or a running average of it, or the gradient and one of these in parts."""

    kept: str | None  # "momentum_buffer", the velocity; "exp_avg", the running average; None without momentum
    nesterov: bool
    coupled: bool

    @property
    def buffers(self) -> tuple[str, ...]:
        return () if self.kept is None else (self.kept,)

    @property
    def bounded(self) -> str | None:
        return self.kept

    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        if self.kept == "momentum_buffer":
            return {"momentum_buffer": k.coasting * (x.momentum_buffer + k.push * x.m)}
        if self.kept == "exp_avg":
            return {"exp_avg": moved(x.exp_avg, x.m, k.w)}
        return {}

    def change(self, x: Values, k: Values) -> Tensor:
        if self.kept is None:
            return k.step * x.m
        average = x.exp_avg if self.kept == "exp_avg" else k.bounded_scale * x.momentum_buffer
        if self.nesterov:
            average = k.momentum * average + (1 - k.momentum) * x.m
        return k.step * average


class BatchInvariantSGD(ExampleOptimizer):
    """SGD with momentum, tuned once at one batch size and used at any.

    With m the mean gradient of a batch of B examples, k = B/batch_size, and rho = momentum^(1/batch_size), the heavy
    ball is given one push by each batch, rolls for B examples, and is slowed down by friction meanwhile:

        v <- v + (1 - dampening) k m
        p <- p (1 - lr weight_decay)^k - lr (1 - rho^B) / (1 - momentum) v
        v <- rho^B v

    v before its last line is torch's momentum_buffer; the state keeps what is left after it. At B = batch_size this is
    torch.optim.SGD's trajectory. One example moves the parameters by lr (1 - dampening) / ((1 - momentum) batch_size)
    g_b in total, sooner or later, whatever the sizes of the batches before and after; `in_examples` takes this factor
    as its lr, whatever the horizon. As in torch, dampening spares the start: here the first batch_size examples.

    The other averages of `units.py` keep a running average g~ of m with weight w(B, E), and

        p <- p - k lr (1 - dampening) / (1 - momentum) g~

    which is torch's too, for "ewma" (g~ from zero, hence torch's undampened start only for dampening = 0). Here an
    example's total effect is the same as long as the batch size is; "debiased_ewma", "slides" and "mean" are not slow
    at the start. With dampening = momentum, the step is lr times an average of gradients.

    Nesterov's step looks batch_size examples ahead. Of any of these steps, it takes the part `momentum`, and in place
    of the rest a step without momentum: momentum g~ + (1 - momentum) m for g~.

    Arguments:
        lr, momentum, dampening, weight_decay, nesterov, maximize: torch.optim.SGD's, as tuned at `batch_size`.
        batch_size: the batch size at which those values were tuned.
        average: "heavy_ball", or one of units.py: "ewma", "debiased_ewma", "slides", w = B / min(E, N) with
            N = batch_size / (1 - momentum), or "mean". momentum = 0 keeps no average.
        decoupled_weight_decay: False adds weight_decay p to every example's gradient, as torch.optim.SGD does.
        max_norm: bounds the norm of g~ over all parameters of the optimizer; for the heavy ball, that of its step in
            the same unit; without momentum, that of m, which depends on the batch size. None does not clip.
        compiled: see ExampleOptimizer.

    It needs no statistics: of a model that is not attached, `step(batch_size=B)` says what m is the mean of.

    Source: Polyak 1964; Nesterov's momentum as in Sutskever et al. 2013, "On the importance of initialization and
    momentum in deep learning", looked at from the point where the gradient is taken; g~ and the total effect:
    D. McAllester, TTIC 31230 lecture slides, "SGD, Momentum, RMSProp, Adam".
    """

    checks = {"average": one_of(("heavy_ball", *AVERAGES))}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        batch_size: float = 256,
        *,
        average: str = "heavy_ball",
        decoupled_weight_decay: bool = True,
        max_norm: float | None = None,
        maximize: bool = False,
        compiled: bool | None = None,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "batch_size": batch_size,
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
        lr: float | Tensor = 4e-6,
        horizon: float = 2560,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> Self:
        """The slides' parametrisation: one example moves the parameters by lr g_b in total, in a horizon of N examples.

        The same as lr / N with momentum = 1 - 1/N, tuned at batch size 1. Decoupled decay is lr weight_decay an
        example, whatever the horizon; `options` are those of the class.
        """
        if not horizon >= 1:
            raise GradstatsError(f"horizon is a number of examples, at least 1; got {horizon}")
        if options.get("decoupled_weight_decay", True):
            weight_decay *= horizon
        return cls(params, lr / horizon, 1 - 1 / horizon, 0.0, weight_decay, nesterov, 1, **options)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        if group["nesterov"] and group["momentum"] == 0:
            raise GradstatsError("nesterov=True needs a momentum above 0")
        if group["nesterov"] and group["dampening"] != 0 and group["average"] == "heavy_ball":
            raise GradstatsError(
                "nesterov=True goes with dampening = 0, or with a running average: average='debiased_ewma'"
            )

    def update(self, group: Mapping[str, Any], batch_size: float, state: Mapping[str, Any]) -> SGDUpdate:
        kept = "momentum_buffer" if group["average"] == "heavy_ball" else "exp_avg"
        return SGDUpdate(
            kept if group["momentum"] != 0 else None,
            group["nesterov"],
            coupled=group["weight_decay"] != 0 and not group["decoupled_weight_decay"],
        )

    def scalars(self, group: Mapping[str, Any], age: Age, update: Update) -> dict[str, Any]:
        assert isinstance(update, SGDUpdate)
        b, e, tuned = age.batch_size, age.examples, group["batch_size"]
        momentum, dampening, k = group["momentum"], group["dampening"], age.batch_size / group["batch_size"]
        if update.kept is None:
            return {"step": k * group["lr"]}
        step = {"step": k * (1 - dampening) / (1 - momentum) * group["lr"], "momentum": momentum}
        if update.kept == "exp_avg":
            return step | {"w": average(group["average"], momentum, tuned).weight(b, e)}
        spared = min(b, max(tuned - (e - b), 0)) / tuned
        return step | heavy_ball(momentum, k, dampening) | {"push": (1 - dampening) * k + dampening * spared}
