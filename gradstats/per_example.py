"""All per-example gradients of a batch, by torch.func: for small models, and for everything that wants them one by
one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gradstats.compute import LossFunction
from gradstats.errors import CoverageError
from gradstats.rules.fallback import vmappable
from gradstats.rules.registry import refuse_coupling


def per_example_gradients(
    model: nn.Module, loss_fn: LossFunction, x: Any, y: Any, chunk_size: int | None = None, loss_reduction: str = "mean"
) -> dict[str, Tensor]:
    """g_b for every example b: a dict from parameter name to (B, *shape).

    g_b = B dL/dtheta_b for a mean loss, dL/dtheta_b for a sum loss, where L = loss_fn(model(x), y) is the loss of the
    whole batch: it may couple examples, the forward may not. One forward under torch.func.vmap, `chunk_size` examples
    at a time (None: all), then the batch loss over all outputs, then the backward of each chunk. Dropout draws a mask
    of its own for every example.

    x is a tensor, a tuple of positional arguments or a dict of keyword arguments; tensors in it have the examples in
    front. Raises: CoverageError for models whose forward couples examples or has no batching rule.
    """
    for module in model.modules():
        refuse_coupling(module)
    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    flat, spec = tree_flatten((args, kwargs))
    batched = [isinstance(value, Tensor) and value.dim() > 0 for value in flat]
    n = next(value.shape[0] for value, b in zip(flat, batched, strict=True) if b)
    batched = [b and value.shape[0] == n for value, b in zip(flat, batched, strict=True)]
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    structure: list[Any] = []

    def one(parameters: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, ...]:
        row = iter(rows)
        inputs = [next(row).unsqueeze(0) if b else value for value, b in zip(flat, batched, strict=True)]
        args, kwargs = tree_unflatten(inputs, spec)
        outputs, out_spec = tree_flatten(torch.func.functional_call(model, parameters, args, kwargs))
        structure[:] = [out_spec]
        return tuple(o.squeeze(0) for o in outputs)

    def chunk(rows: list[Tensor]):
        copies = {name: p.expand(len(rows[0]), *p.shape) for name, p in parameters.items()}
        over = torch.func.vmap(one, randomness="different")
        return torch.func.vjp(lambda copies: over(copies, *rows), copies)

    size = chunk_size or n
    rows = [value for value, b in zip(flat, batched, strict=True) if b]
    try:
        with vmappable():
            chunks = [chunk([r[i : i + size] for r in rows]) for i in range(0, n, size)]
    except RuntimeError as error:
        raise CoverageError(f"{type(model).__name__} does not run under torch.func.vmap: {error}") from error
    outputs = [torch.cat(parts).detach().requires_grad_() for parts in zip(*(out for out, _ in chunks), strict=True)]
    with torch.enable_grad():
        loss = loss_fn(tree_unflatten(outputs, structure[0]), y)
    cotangents = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
    pieces = [vjp(tuple(c[i * size : (i + 1) * size] for c in cotangents))[0] for i, (_, vjp) in enumerate(chunks)]
    scale = n if loss_reduction == "mean" else 1
    return tree_map(lambda *parts: torch.cat(parts).mul_(scale), *pieces)
