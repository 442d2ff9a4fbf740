"""The vmap leaf: any module without a rule, run under torch.func.vmap with one copy of its parameters per example.

Each parameter is expanded to (n, *shape) with stride 0; the gradient of the expanded tensor IS the stack of
contributions c_b. Exact for whatever vmaps, at the price of n copies of the module's gradient during the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradstats.contribution import Dense
from gradstats.errors import CoverageError
from gradstats.rules.registry import Rule, refuse


class Expand(Rule):
    """y = p expanded to (n, *shape)."""

    @staticmethod
    def forward(options, x, parameters):
        (n,) = options
        (p,) = parameters.values()
        return p.expand(n, *p.shape), ()

    @staticmethod
    def backward(options, saved, d, wanted):
        return None, {name: Dense(d) for name in wanted}


@contextmanager
def vmappable() -> Iterator[None]:
    """Inside, torch.func.vmap is right where by itself it fails or is silently wrong."""
    with sdpa_kernel(SDPBackend.MATH), EmbeddingUnderVmap():  # the fused attention kernels have no batching rule
        yield


class EmbeddingUnderVmap(TorchFunctionMode):
    """F.embedding as it is outside of vmap, whose batching rule forgets padding_idx and counts frequencies per
    example."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        call = inspect.signature(F.embedding).bind(*args, **kwargs).arguments
        if call.get("scale_grad_by_freq") or call.get("max_norm") is not None:
            raise CoverageError(
                "an embedding with scale_grad_by_freq or max_norm does not run under vmap: build it without"
            )
        ids, weight, padding_idx = call["input"], call["weight"], call.get("padding_idx")
        rows = F.embedding(ids, weight)
        if padding_idx is None:
            return rows
        return torch.where((ids == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def check(module: nn.Module) -> None:
    """Raises CoverageError for modules known not to vmap, or to hide the example dimension."""
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            raise refuse(
                child, "torch.func has no batching rule for recurrent layers", "Leave it out of the attached model"
            )
        if getattr(child, "batch_first", True) is False:
            raise refuse(child, "batch_first=False puts positions before examples", "Build it with batch_first=True")


class _Body(nn.Module):
    """Calls the original class's forward, without the module's hooks: those run once, around the vmapped call."""

    def __init__(self, inner: nn.Module, kind: type[nn.Module]):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, *args, **kwargs):
        return self.kind.forward(self.inner, *args, **kwargs)


def run(
    module: nn.Module,
    kind: type[nn.Module],
    expand: Callable[[str, int], Tensor],
    names: tuple[str, ...],
    n: int,
    args: Any,
    kwargs: Any,
) -> Any:
    """module(*args, **kwargs) over n examples, each a batch of one; `expand(name, n)` gives the expanded parameter."""
    flat, spec = tree_flatten((args, kwargs))
    dims = [dimension(module, value, n, first=i == 0) for i, value in enumerate(flat)]
    expanded = {f"inner.{name}": expand(name, n) for name in names}
    body = _Body(module, kind)
    layout: list[Any] = []

    def one(parameters: dict[str, Tensor], *mapped: Tensor) -> tuple[Tensor, ...]:
        values = iter(mapped)
        inputs = [next(values).unsqueeze(0) if dim == 0 else value for value, dim in zip(flat, dims, strict=True)]
        args, kwargs = tree_unflatten(inputs, spec)
        outputs, out_spec = tree_flatten(torch.func.functional_call(body, parameters, args, kwargs))
        layout[:] = [out_spec, [isinstance(o, Tensor) for o in outputs], outputs]
        for o in outputs:
            if isinstance(o, Tensor) and (o.dim() == 0 or o.shape[0] != 1):
                raise refuse(
                    module,
                    f"for one example it returns a tensor of shape {tuple(o.shape)}, with no dimension of examples",
                    "Return losses and other reductions outside of the attached module",
                )
        return tuple(o.squeeze(0) for o in outputs if isinstance(o, Tensor))

    mapped = [value for value, dim in zip(flat, dims, strict=True) if dim == 0]
    try:
        with vmappable():
            results = torch.func.vmap(one, in_dims=(0, *[0] * len(mapped)), randomness="different")(expanded, *mapped)
    except CoverageError:
        raise
    except RuntimeError as error:
        raise refuse(
            module, f"it does not run under torch.func.vmap ({error})", "Split it into layers that have rules"
        ) from error
    out_spec, is_tensor, outputs = layout
    tensors = iter(results)
    return tree_unflatten([next(tensors) if t else o for t, o in zip(is_tensor, outputs, strict=True)], out_spec)


def dimension(module: nn.Module, value: Any, n: int, first: bool) -> int | None:
    """0 for a tensor with one row an example, None for what all examples share."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != n:
        return None
    if n > 1 and not first and value.dim() == 2 and value.shape[1] == n:
        raise refuse(
            module,
            f"an argument of shape {tuple(value.shape)} could be one row an example or a square shared by all",
            "Use another batch size",
        )
    return 0
