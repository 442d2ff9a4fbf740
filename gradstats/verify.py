"""Is it exact on my model? Every statistic against an oracle that knows nothing of rules, leaves or vmap."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from gradstats.arguments import ExampleDims
from gradstats.caller import LEAF
from gradstats.choice import unmeasured
from gradstats.compute import LossFunction, call, compute, refuse_losses
from gradstats.definitions import comparable, define
from gradstats.distributed.sharded import is_sharded
from gradstats.errors import GradstatsError, VerificationError
from gradstats.matmul import ROUNDING
from gradstats.statistics import Wanted, statistic_of

# Beside the largest of its kind in the model, what is as good as zero.
NEGLIGIBLE = 1e-6

# Of the metric below, by the dtype in which the statistics are computed; the oracle is always in float64.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Row:
    """One parameter, one statistic."""

    parameter: str
    shape: tuple[int, ...]
    statistic: str
    error: float


@dataclass(frozen=True)
class Verification:
    """Per-parameter errors, worst first. Printing it prints the table."""

    rows: tuple[Row, ...]
    tolerance: float

    @property
    def worst(self) -> Row:
        """That of the largest error."""
        return self.rows[0]

    def __str__(self) -> str:
        width = max(len("parameter"), *(len(r.parameter) for r in self.rows))
        lines = [f"{'parameter':{width}}  {'shape':>18}  {'statistic':>14}  error"]
        lines += [f"{r.parameter:{width}}  {r.shape!s:>18}  {r.statistic:>14}  {r.error:.1e}" for r in self.rows]
        return "\n".join(lines)


def verify(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    statistics: Sequence[Wanted] = ("second_moment", "variance", "norms"),
    engine: str = "fused",
    loss_reduction: str = "mean",
    granularity: str = "example",
    microbatch_size: int | None = None,
    ignore: Sequence[str] = (),
    example_dims: ExampleDims = 0,
    dtype: torch.dtype = torch.float64,
    statistics_dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Compares statistics with the oracle: one backward pass per example, with that example's share of the batch loss's
    cotangent.

    The error of a statistic of one parameter is ||a - b|| / max(||b||, 1e-6 ||b over all parameters||), b the oracle's;
    that of a variance is relative to the second moment, from which it is the difference. Signs, ratios and angles of
    gradients that are zero but for rounding are not compared. An example's share are its rows of the outputs: a model
    whose last operation mixes rows (logits of all pairs) is to be verified without it.

    Arguments:
        x, y, loss_fn: as for `compute`; a few examples are enough, two at least.
        granularity, microbatch_size, ignore, example_dims: as for `attach`; "token" has no oracle, and the outputs have
            the examples where example_dims says if it is a number.
        dtype: in which the statistics under test are computed, on a copy of the model; the oracle's is float64. With
            dropout, which draws other masks in another dtype, leave it at float64.
        statistics_dtype: as for `attach`; the table then shows what it costs in precision.
        tolerance: of the error; None takes 1e-8 for float64, 1e-4 for float32, 5e-2 for bfloat16 and 5e-3 for float16,
            to which statistics in bfloat16 add 3 2^-8 B/(B-1), their bound for the variance of B examples.

    Returns: the table of errors. Raises: VerificationError naming the worst parameter if any error is above the
    tolerance; GradstatsError for what has no oracle, and what `compute` raises.
    """
    if any(LEAF in module.__dict__ for module in model.modules()):
        raise GradstatsError("verify attaches a copy of its own: detach() the model first, or verify before attach")
    if is_sharded(model):
        raise GradstatsError("verify copies the model, which fully_shard forbids: verify it before fully_shard")
    if isinstance(model, DistributedDataParallel):
        raise GradstatsError("verify compares with passes of this process alone: give it the module inside of DDP")
    if granularity == "token":
        raise GradstatsError("verify has no oracle for single positions: choose 'example' or 'microbatch'")
    refuse_losses(engine)
    menu = [statistic_of(wanted) for wanted in statistics]
    state = torch.random.get_rng_state()
    contributions = per_example_oracle(
        cast(copy.deepcopy(model), torch.float64),
        loss_fn,
        cast(x, torch.float64),
        cast(y, torch.float64),
        example_dims if isinstance(example_dims, int) else 0,
    )
    torch.random.set_rng_state(state)
    tested = cast(copy.deepcopy(model), dtype)
    # The error that a reduced precision permits, although this process may find the exact way as fast.
    first_ways = nullcontext() if statistics_dtype is None else unmeasured()
    with first_ways:
        found = compute(
            tested,
            loss_fn,
            cast(x, dtype),
            cast(y, dtype),
            menu,
            engine,
            loss_reduction,
            granularity,
            microbatch_size,
            ignore,
            example_dims,
            statistics_dtype,
        )
    gradients = {}
    for name, c in contributions.items():
        c = c.unflatten(0, (-1, microbatch_size)).sum(1) if microbatch_size else c
        gradients[name] = c * len(c) if loss_reduction == "mean" else c
    count = len(next(iter(gradients.values())))
    limit = tolerance_of(dtype, statistics_dtype, count) if tolerance is None else tolerance
    zero = NEGLIGIBLE * max(float(g.abs().max()) for g in gradients.values())
    rows = []
    for statistic in menu:
        expected = {name: define(statistic, name, g, loss_reduction) for name, g in gradients.items()}
        numbers = {name: comparable(statistic.name, expected[name], g, zero) for name, g in gradients.items()}
        scale_by = {
            name: norm_of(g.square().mean(0) if statistic.name == "variance" else numbers[name])
            for name, g in gradients.items()
        }
        floor = NEGLIGIBLE * math.hypot(*scale_by.values())
        for name, value in found.statistics[statistic.name].items():
            tested_numbers = comparable(statistic.name, value, gradients[name], zero)
            difference = [a.double() - b for a, b in zip(tested_numbers, numbers[name], strict=True)]
            error = norm_of(difference) / max(scale_by[name], floor, 1e-300)
            rows.append(Row(name, tuple(tested.get_parameter(name).shape), statistic.name, error))
    result = Verification(
        tuple(sorted(rows, key=lambda row: -row.error if row.error == row.error else -torch.inf)), limit
    )
    if not result.worst.error <= limit:
        w = result.worst
        raise VerificationError(
            f"{w.statistic} of parameter '{w.parameter}' {w.shape} differs from the oracle by {w.error:.2e}, "
            f"above {limit:.0e}.\n{result}"
        )
    return result


def tolerance_of(dtype: torch.dtype, statistics_dtype: torch.dtype | None, count: int) -> float:
    """What the dtypes can do, with `count` examples or micro-batches."""
    if statistics_dtype is None:
        return TOLERANCES[dtype]
    return TOLERANCES[dtype] + ROUNDING[statistics_dtype] * count / max(1, count - 1)


def per_example_oracle(model: nn.Module, loss_fn: LossFunction, x: Any, y: Any, dim: int = 0) -> dict[str, Tensor]:
    """c_b of every trainable parameter, (B, *shape): a full forward, the batch loss's cotangent, then one backward per
    example with all other rows of the cotangent zeroed. Leaves the gradients of `model` None."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.enable_grad():
        output = call(model, x)
        outputs = [o for o in tree_leaves(output) if isinstance(o, Tensor) and o.requires_grad]
        cut = {id(o): o.detach().requires_grad_() for o in outputs}
        loss = loss_fn(tree_map(lambda o: cut.get(id(o), o) if isinstance(o, Tensor) else o, output), y)
    cotangents = torch.autograd.grad(loss, list(cut.values()), allow_unused=True, materialize_grads=True)
    if not outputs or any(o.dim() <= dim for o in outputs):
        raise GradstatsError(
            "verify cuts the model at its outputs, which must run over the examples: call it without labels, and take "
            "the loss in loss_fn"
        )
    n = outputs[0].shape[dim]
    contributions: dict[str, list[Tensor]] = {name: [] for name in named}
    for b in range(n):
        row = torch.tensor([b], device=outputs[0].device)
        share = [torch.zeros_like(c).index_copy_(dim, row, c.narrow(dim, b, 1)) for c in cotangents]
        torch.autograd.backward(outputs, share, retain_graph=b < n - 1)
        for name, p in named.items():
            contributions[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    return {name: torch.stack(c) for name, c in contributions.items()}


def cast(what: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, or a module, in another dtype."""
    if isinstance(what, nn.Module):
        return what.to(dtype)
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, what)


def norm_of(value: Any) -> float:
    """Euclidean, over all tensors in it."""
    return math.hypot(*(float(t.double().norm()) for t in tree_leaves(value)))
