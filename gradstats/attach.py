"""`attach`: the one call that puts statistics under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gradstats.arguments import ExampleDims
from gradstats.engines import ENGINES
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import Handle, Wanted, handle_of
from gradstats.swap import LEAF


def attach(
    model: nn.Module,
    *statistics: Wanted,
    engine: str = "fused",
    loss_reduction: str = "mean",
    ignore: Sequence[str] = (),
    example_dims: ExampleDims = 0,
    granularity: str = "example",
    microbatch_size: int | None = None,
    grad_scaler: Any = None,
) -> Handle:
    """Gathers statistics of the per-example gradients of `model` in every backward pass from here on.

    For contributions c_b, with g_b = B c_b for a mean loss and g_b = c_b for a sum loss:

        second_moment  q  = (1/B) sum_b g_b^2          shaped like the parameter (the default)
        variance       s2 = B/(B-1) (q - m^2)          shaped like the parameter
        norms          ||g_b||                         (B,) per parameter and in total

    Arguments:
        model: examples run along the first dimension of its inputs, and of those of its layers.
        statistics: names from the menu above; none means "second_moment".
        engine: "fused" (layer rules, vmap for modules without one), "vmap" (the whole model under torch.func.vmap:
            exact for shared parameters too, B copies of the gradient in memory), "opacus" (its GradSampleModule, as a
            cross-check).
        loss_reduction: "mean" or "sum", how the loss that is backpropagated runs over the examples.

    The model keeps its class names, parameters and state_dict. Only calls with gradients enabled are affected. The
    handle is also a context manager that detaches. Examples are rows of the batch: positions are summed before
    squaring.

    Raises: CoverageError for a model without exact per-example gradients (BatchNorm in training), or with parameters
        that the engine cannot serve (shared ones, recurrent layers); GradstatsError for unknown names and a model
        attached already.
    """
    if engine not in ENGINES:
        raise GradstatsError(f"unknown engine {engine!r}; choose one of {sorted(ENGINES)}")
    return ENGINES[engine](
        model,
        statistics or ("second_moment",),
        loss_reduction,
        ignore=ignore,
        example_dims=example_dims,
        granularity=granularity,
        microbatch_size=microbatch_size,
    )


def attached(model: nn.Module) -> Handle:
    """The handle of an attached model, or of a copy of one. Raises: MissingStatistic."""
    for module in model.modules():
        if LEAF in module.__dict__:
            return module.__dict__[LEAF].handle
    for p in model.parameters():
        if (handle := handle_of(p)) is not None:
            return handle
    raise MissingStatistic(f"{type(model).__name__} is not attached: call gradstats.attach(model)")
