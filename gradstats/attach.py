"""`attach`: the one call that puts statistics under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradstats.arguments import ExampleDims
from gradstats.caller import LEAF
from gradstats.distributed.sharded import is_sharded
from gradstats.engines import ENGINES
from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import Handle, handle_of
from gradstats.sampling import Sampling
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
    probes: int = 1,
    generator: torch.Generator | None = None,
    statistics_dtype: torch.dtype | None = None,
    every: int = 1,
    fraction: float = 1.0,
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
            estimate; the others ask for granularity="microbatch". Two gradients more in memory, three in backward),
            "random_sign" (any model at all, like it, from one forward: `stats.backward(losses)`, of losses of single
            examples (B,), backpropagates them `probes` times more under random signs. The same three statistics,
            without bias and in the same memory; engines/random_sign.py has the equations).
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
        probes: of engine "random_sign", backward passes beside that of the gradient. The more, the smaller the variance
            of the estimates: about 1/probes of that of one, and none from n - 1 on, n the power of two at or above B.
        generator: what the signs of engine "random_sign" and the examples of `fraction` are drawn from; None is one of
            its own, seeded with the rank (0 of one process), so that torch's global one is untouched. Give one and save
            its state, get_state(), to resume a run exactly.
        statistics_dtype: torch.bfloat16 permits to round the factors of matmuls that serve statistics alone and add up
            positive terms (squares and absolute values, of Linear layers without positions), where that is the fastest
            way; they are added up in float32. Such a sum is then off by 0.2%, by 3 2^-8 = 1.2% at most, and a variance
            by B/(B-1) times that of the second moment; gradients are not. None, the default, is exact, and so is a
            device without instructions for bfloat16. `verify` measures the error that is permitted.
        every: k gathers statistics in the first window and every k-th after it; a window is what p.grad accumulates
            until it is None again. In between a step costs what it costs without statistics, `stats.gathered` is False
            and reading raises MissingStatistic. Running averages of the optimizers account for it. Under torch.compile,
            an optimizer's step() ends the window.
        fraction: f gathers sums with an entry for every element (second_moment, variance, abs_mean, sign_mean) over
            max(1, round(f B)) random examples of every backward pass, times B over their number: unbiased (sampling.py
            has the variance). The gradient is that of all examples.

    The model keeps its class names, parameters and state_dict. Only calls with gradients enabled are affected. The
    handle is also a context manager that detaches. Examples are rows of the batch: positions are summed before
    squaring.

    Raises: CoverageError for a model without exact per-example gradients (BatchNorm in training), or with parameters
        that the engine cannot serve; GradstatsError for unknown names, statistics that the engine cannot give and a
        model attached already.
    """
    if engine not in ENGINES:
        raise GradstatsError(f"unknown engine {engine!r}; choose one of {sorted(ENGINES)}")
    if statistics_dtype is not None and (statistics_dtype is not torch.bfloat16 or engine != "fused"):
        raise GradstatsError(
            f"statistics_dtype={statistics_dtype} with engine={engine!r}: reduced precision is torch.bfloat16, which "
            f"has the range of float32, and for the matmuls of engine 'fused'"
        )
    if is_sharded(model) and (engine not in ("fused", "vmap") or grad_scaler is not None or follow_clipping):
        raise GradstatsError(
            "the model is sharded by fully_shard, where engines other than 'fused' and 'vmap', grad_scaler and "
            "follow_clipping are not covered: train in bfloat16 (MixedPrecisionPolicy), and clip with the optimizer's "
            "max_norm or stats.clip_grad_norm_"
        )
    own = torch.Generator().manual_seed(dist.get_rank() if dist.is_available() and dist.is_initialized() else 0)
    sampling = Sampling(every, fraction, generator or own)
    options: dict[str, Any] = {}
    if engine == "random_sign":
        options = {"probes": probes, "generator": generator}
    elif probes != 1 or (generator is not None and fraction == 1):
        raise GradstatsError(
            f"engine {engine!r} draws nothing: probes and generator are for engine='random_sign', and generator for "
            f"fraction below 1"
        )
    if every != 1 or fraction != 1:
        if engine not in ("fused", "vmap"):
            raise GradstatsError(
                f"engine {engine!r} gathers all that it sees: every and fraction are for engine='fused' and 'vmap'"
            )
        options["sampling"] = sampling
    handle = ENGINES[engine](
        without_ddp(model),
        statistics or ("second_moment",),
        loss_reduction,
        ignore=ignore,
        example_dims=example_dims,
        granularity=granularity,
        microbatch_size=microbatch_size,
        **options,
    )
    if grad_scaler is not None:
        handle.follow(grad_scaler)
    handle.follows_clipping = follow_clipping
    handle.statistics_dtype = statistics_dtype
    return handle


def without_ddp(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel wraps, whose parameters have names without its "module." in front."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def attached(model: nn.Module) -> Handle:
    """The handle of an attached model, or of a copy of one. Raises: MissingStatistic."""
    for module in model.modules():
        if LEAF in module.__dict__:
            return module.__dict__[LEAF].handle
    for p in model.parameters():
        if (handle := handle_of(p)) is not None:
            return handle
    raise MissingStatistic(f"{type(model).__name__} is not attached: call gradstats.attach(model)")
