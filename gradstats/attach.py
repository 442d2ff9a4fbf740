"""`attach`: the one call that puts statistics under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gradstats.arguments import ExampleDims
from gradstats.caller import LEAF
from gradstats.engines import ENGINES
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import Handle, handle_of
from gradstats.statistics import Wanted


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
    follow_clipping: bool = False,
) -> Handle:
    """Gathers statistics of the per-example gradients of `model` in every backward pass from here on.

    For contributions c_b, with g_b = B c_b for a mean loss and g_b = c_b for a sum loss, m their mean:

        second_moment  q  = (1/B) sum_b g_b^2          shaped like the parameter (the default)
        variance       s2 = B/(B-1) (q - m^2)          shaped like the parameter
        norms          ||g_b||                         (B,) per parameter and in total

    and sign_mean, abs_mean, max_abs, snr, noise_scale, gram, cosine_similarity, histogram and projection (statistics.py
    has their equations).

    Arguments:
        model: examples run along the first dimension of its inputs; the probe finds where they are in its layers.
        statistics: names from the menu above, or statistics of one's own (gradstats.BlockStatistic); none means
            "second_moment".
        engine: "fused" (layer rules, vmap for modules without one), "vmap" (the whole model under torch.func.vmap:
            B copies of the gradient in memory), "opacus" (its GradSampleModule, as a cross-check), "microbatch" (any
            model at all, BatchNorm in training too: every backward pass between two zero_grad() is one micro-batch of
            b examples, M of them make B = M b, the loss of each over M. With Q_b the mean of the squared gradients of
            the micro-batches,

                s2 = (Q_b - m^2)/(1/b - 1/B)        q = m^2 + s2 (B - 1)/B

            equal fused's in expectation, and exactly for b = 1. second_moment, variance and noise_scale have such an
            estimate; the others ask for granularity="microbatch". Two gradients more in memory, three in backward).
        loss_reduction: "mean" or "sum", how the loss that is backpropagated runs over the examples.
        ignore: names of parameters, or of modules with all their parameters, that are to have no statistics.
        example_dims: where the examples are in the model's arguments, if not in front: one dimension for all, or a
            dict from position or keyword to a dimension, None for what all examples share.
        granularity: what counts as one: "example", "token" (every position by itself), or "microbatch" (the mean of
            `microbatch_size` consecutive examples; with engine "microbatch" those of a backward pass).
        grad_scaler: the torch.amp.GradScaler whose scaled loss is backpropagated. Statistics are then those of the
            loss itself, by the scale at the time of the backward pass, before and after scaler.unscale_, scaler.step
            and scaler.update; inf or nan where gradients overflowed. BatchInvariantAdam needs no such argument, and
            takes no harm from it.
        follow_clipping: for trainers that clip by themselves. Once p.grad of all parameters was multiplied by one
            factor f (torch.nn.utils.clip_grad_norm_), so are the contributions, and statistics are those of the clipped
            gradient. f is recognised from two numbers of every gradient, noted in each backward pass; any other change
            is refused. In a loop of one's own, `stats.clip_grad_norm_` needs no such argument.

    The model keeps its class names, parameters and state_dict. Only calls with gradients enabled are affected. The
    handle is also a context manager that detaches. Examples are rows of the batch: positions are summed before
    squaring.

    Raises: CoverageError for a model without exact per-example gradients (BatchNorm in training), or with parameters
        that the engine cannot serve; GradstatsError for unknown names, statistics that the engine cannot give and a
        model attached already.
    """
    if engine not in ENGINES:
        raise GradstatsError(f"unknown engine {engine!r}; choose one of {sorted(ENGINES)}")
    handle = ENGINES[engine](
        model,
        statistics or ("second_moment",),
        loss_reduction,
        ignore=ignore,
        example_dims=example_dims,
        granularity=granularity,
        microbatch_size=microbatch_size,
    )
    if grad_scaler is not None:
        handle.follow(grad_scaler)
    handle.follows_clipping = follow_clipping
    return handle


def attached(model: nn.Module) -> Handle:
    """The handle of an attached model, or of a copy of one. Raises: MissingStatistic."""
    for module in model.modules():
        if LEAF in module.__dict__:
            return module.__dict__[LEAF].handle
    for p in model.parameters():
        if (handle := handle_of(p)) is not None:
            return handle
    raise MissingStatistic(f"{type(model).__name__} is not attached: call gradstats.attach(model)")
