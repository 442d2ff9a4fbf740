"""The functional form: loss, gradients and statistics of one batch, leaving no trace on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.attach import attach
from gradstats.errors import MissingStatistic
from gradstats.handle import total_norms

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Result:
    """Of one batch: the loss, its gradients by name, and the statistics asked for, by name of statistic and
    parameter."""

    loss: Tensor
    gradients: dict[str, Tensor]
    batch_size: int
    statistics: dict[str, dict[str, Tensor]]
    total_norms: Tensor | None = None

    def _get(self, name: str) -> dict[str, Tensor]:
        if name not in self.statistics:
            raise MissingStatistic(f"{name!r} was not computed: pass statistics=[..., {name!r}]")
        return self.statistics[name]

    @property
    def second_moment(self) -> dict[str, Tensor]:
        return self._get("second_moment")

    @property
    def variance(self) -> dict[str, Tensor]:
        return self._get("variance")

    @property
    def norms(self) -> dict[str, Tensor]:
        return self._get("norms")


def compute(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    statistics: Sequence[str] = ("second_moment",),
    engine: str = "fused",
    loss_reduction: str = "mean",
) -> Result:
    """Statistics of the per-example gradients of loss_fn(model(x), y), as `attach` defines them.

    x is a tensor, a tuple of positional arguments or a dict of keyword arguments. Gradients that the parameters hold
    already are untouched. Raises what `attach` raises.
    """
    held = {p: p.grad for p in model.parameters()}
    for p in held:
        p.grad = None
    try:
        with attach(model, *statistics, engine=engine, loss_reduction=loss_reduction) as handle, torch.enable_grad():
            loss = loss_fn(call(model, x), y)
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            # A parameter that the loss does not depend on has no gradient, and no statistics.
            found = {name: {p: handle.read(name)[p] for p in gradients} for name in statistics}
            total = total_norms(found["norms"].values()) if "norms" in statistics else None
            return Result(loss.detach(), gradients, handle.batch_size, found, total)
    finally:
        for p, grad in held.items():
            p.grad = grad


def call(model: nn.Module, x: Any) -> Any:
    """model(x), with tuples and dicts spread over arguments."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)
