"""The functional form: loss, gradients and statistics of one batch, leaving no trace on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.arguments import ExampleDims
from gradstats.attach import attach
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.statistics import Wanted

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Result:
    """Of one batch: the loss, its gradients by name, the statistics asked for by name of statistic and parameter, and
    those of the whole gradient by name of statistic, where they exist."""

    loss: Tensor
    gradients: dict[str, Tensor]
    batch_size: int
    statistics: dict[str, dict[str, Any]]
    totals: dict[str, Any]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """A statistic by parameter. Raises: MissingStatistic if it was not asked for."""
        if name not in self.statistics:
            raise MissingStatistic(f"{name!r} was not computed: pass statistics=[..., {name!r}]")
        return self.statistics[name]

    @property
    def second_moment(self) -> dict[str, Tensor]:
        """q of every parameter (*shape)."""
        return self["second_moment"]

    @property
    def variance(self) -> dict[str, Tensor]:
        """s2 of every parameter (*shape)."""
        return self["variance"]

    @property
    def norms(self) -> dict[str, Tensor]:
        """||g_b|| of every parameter (B,)."""
        return self["norms"]

    @property
    def total_norms(self) -> Tensor | None:
        """||g_b|| of the whole gradient (B,), if "norms" were asked for."""
        return self.totals.get("norms")


def compute(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    statistics: Sequence[Wanted] = ("second_moment",),
    engine: str = "fused",
    loss_reduction: str = "mean",
    granularity: str = "example",
    microbatch_size: int | None = None,
    ignore: Sequence[str] = (),
    example_dims: ExampleDims = 0,
    statistics_dtype: torch.dtype | None = None,
) -> Result:
    """Statistics of the per-example gradients of loss_fn(model(x), y); what `attach` takes is as it defines it.

    x is a tensor, a tuple of positional arguments or a dict of keyword arguments. Gradients that the parameters hold
    already are untouched. Raises what `attach` raises, and GradstatsError for engine "random_sign", which needs the
    losses of single examples where loss_fn gives that of the batch.
    """
    refuse_losses(engine)
    held = {p: p.grad for p in model.parameters()}
    for p in held:
        p.grad = None
    try:
        handle = attach(
            model,
            *statistics,
            engine=engine,
            loss_reduction=loss_reduction,
            granularity=granularity,
            microbatch_size=microbatch_size,
            ignore=ignore,
            example_dims=example_dims,
            statistics_dtype=statistics_dtype,
        )
        with handle, torch.enable_grad():
            loss = loss_fn(call(model, x), y)
            loss.backward()
            gradients = {name: p.grad for name, p in handle.model.named_parameters() if p.grad is not None}
            # A parameter that the loss does not depend on has no gradient, and no statistics.
            served = [name for name in handle.parameters() if name in gradients]
            found = {name: {p: handle.read(name)[p] for p in served} for name in handle.statistics}
            totals = {name: handle.read(name).total for name in handle.statistics if handle.read(name).has_total}
            return Result(loss.detach(), gradients, handle.batch_size, found, totals)
    finally:
        for p, grad in held.items():
            p.grad = grad


def refuse_losses(engine: str) -> None:
    """Raises: GradstatsError for an engine that loss_fn cannot serve."""
    if engine == "random_sign":
        raise GradstatsError(
            "engine 'random_sign' backpropagates losses of single examples (B,), and loss_fn gives the loss of the "
            "batch: use attach(model, engine='random_sign') and stats.backward(losses), or another engine here"
        )


def call(model: nn.Module, x: Any) -> Any:
    """model(x), with tuples and dicts spread over arguments."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)
