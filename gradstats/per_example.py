"""All per-example gradients of a batch, by torch.func: for small models, and for everything that wants them one by
one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradstats.arguments import Arguments, ExampleDims
from gradstats.attach import without_ddp
from gradstats.compute import LossFunction
from gradstats.distributed.sharded import is_sharded
from gradstats.errors import CoverageError, GradstatsError
from gradstats.handle import LOSS_REDUCTIONS
from gradstats.layout import FIRST, Layout
from gradstats.rules import alone, fallback


def per_example_gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    chunk_size: int | None = None,
    loss_reduction: str = "mean",
    example_dims: ExampleDims = 0,
) -> dict[str, Tensor]:
    """g_b for every example b: a dict from parameter name to (B, *shape).

    g_b = B dL/dtheta_b for a mean loss, dL/dtheta_b for a sum loss, where L = loss_fn(model(x), y) is the loss of the
    whole batch: it may couple examples, the forward may not. One forward under torch.func.vmap, `chunk_size` examples
    at a time (None: all), then the batch loss over all outputs, then the backward of each chunk. Dropout draws a mask
    of its own for every example.

    x is a tensor, a tuple of positional arguments or a dict of keyword arguments; tensors in it have the examples in
    front. Of a DistributedDataParallel they are those of this rank's batch, by the names that `attach` has too, of the
    module inside. Raises: CoverageError for models whose forward couples examples or has no batching rule.
    """
    if loss_reduction not in LOSS_REDUCTIONS:
        raise GradstatsError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, not {loss_reduction!r}")
    if is_sharded(model):
        raise GradstatsError("torch.func does not see sharded parameters: call this before fully_shard")
    model = without_ddp(model)
    fallback.check(model)
    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    arguments = Arguments(args, kwargs, example_dims)
    if arguments.squares:
        raise CoverageError(
            f"{type(model).__name__}: a square argument could be one row an example or shared by all. Use another "
            f"batch size, or say which: example_dims={{...}}"
        )
    n = arguments.count or 0
    layouts = [None if dim is None else Layout(dim) for dim in arguments.dims]
    otherwise = Layout(example_dims) if isinstance(example_dims, int) else FIRST
    call = fallback.OverExamples(model, type(model), args, kwargs)
    if n > 1:
        alone.compare(call, layouts, n)
    rows, one = call.mapped(layouts, n), call.over(layouts)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def chunk(rows: list[Tensor]):
        copies = {name: p.expand(len(rows[0]), *p.shape) for name, p in parameters.items()}
        mapped = torch.func.vmap(one, randomness="different")
        return torch.func.vjp(lambda copies: mapped(copies, *rows), copies)

    size = chunk_size or n
    with fallback.vmappable(model):
        chunks = [chunk([r[i : i + size] for r in rows]) for i in range(0, n, size)]
    outputs = [torch.cat(parts).detach().requires_grad_() for parts in zip(*(out for out, _ in chunks), strict=True)]
    with torch.enable_grad():
        loss = loss_fn(call.rebuild(outputs, layouts, otherwise), y)
    cotangents = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
    pieces = [vjp(tuple(c[i * size : (i + 1) * size] for c in cotangents))[0] for i, (_, vjp) in enumerate(chunks)]
    scale = n if loss_reduction == "mean" else 1
    return {name: torch.cat([piece[name] for piece in pieces]).mul_(scale) for name in parameters}
