"""The vmap leaf: any module without a rule, run under torch.func.vmap with one copy of its parameters per example.

Each parameter is expanded to (n, *shape) with stride 0; the gradient of the expanded tensor IS the stack of
contributions c_b. Exact for whatever vmaps, at the price of n copies of the module's gradient during the backward. What
does not vmap (recurrent layers, control flow that depends on data) runs once an example, in a loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gradstats.errors import CoverageError
from gradstats.forms.dense import Dense
from gradstats.graph import saves_through_hooks
from gradstats.layout import FIRST, Layout
from gradstats.rules.registry import Rule, refuse, refuse_coupling


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


class DoesNotVmap(CoverageError):
    """The module does not run under torch.func.vmap."""


def check(module: nn.Module) -> None:
    """Raises CoverageError for modules known to couple examples."""
    for child in module.modules():
        refuse_coupling(child)


class Body(nn.Module):
    """Calls the original class's forward, without the module's hooks: those run once, around the vmapped call."""

    def __init__(self, inner: nn.Module, kind: type[nn.Module]):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, *args, **kwargs):
        return self.kind.forward(self.inner, *args, **kwargs)


class KeepTensors(TorchFunctionMode):
    """Under it copy.deepcopy copies objects, and not the tensors in them: those of a graph cannot be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def untouched(value: Any) -> Any:
    """A copy of an object that a module is given and may change, like a cache of keys and values: it runs several
    times."""
    if value is None or isinstance(value, Tensor | nn.Module | bool | int | float | str):
        return value
    with KeepTensors():
        return copy.deepcopy(value)


class OverExamples:
    """One call of a module as a function of parameters and of one example, to be mapped over both."""

    def __init__(self, module: nn.Module, kind: type[nn.Module], args: Any, kwargs: Any):
        self.module, self.body = module, Body(module, kind)
        flat, self.spec = tree_flatten((args, kwargs))
        self.flat = [untouched(v) for v in flat]
        self.outputs: list[Any] = []  # of one example, and their structure
        self.structure: Any = None

    @property
    def key(self) -> Any:
        """The kind of call: structure of the arguments and ranks of the tensors in it."""
        return self.spec, tuple(x.dim() if isinstance(x, Tensor) else None for x in self.flat)

    def plain(self, buffers: dict[str, Tensor]) -> list[Any]:
        """The outputs over the whole batch."""
        named = {f"inner.{name}": buffer for name, buffer in buffers.items()}
        args, kwargs = tree_unflatten([untouched(v) for v in self.flat], self.spec)
        return tree_leaves(torch.func.functional_call(self.body, named, args, kwargs))

    def mapped(self, layouts: Sequence[Layout | None], n: int) -> list[Tensor]:
        """The tensors that have examples, as (n, ...)."""
        return [layout.examples(v, n) for layout, v in zip(layouts, self.flat, strict=False) if layout is not None]

    def over(self, layouts: Sequence[Layout | None]):
        """The function of parameters and one example's tensors, which gives its output's tensors."""
        inputs = layouts[: len(self.flat)]

        def one(parameters: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, ...]:
            row = iter(rows)
            flat = [untouched(v) if layout is None else next(row) for layout, v in zip(inputs, self.flat, strict=True)]
            args, kwargs = tree_unflatten(flat, self.spec)
            inner = {f"inner.{name}": p for name, p in parameters.items()}
            self.outputs, self.structure = tree_flatten(torch.func.functional_call(self.body, inner, args, kwargs))
            return tuple(o for o in self.outputs if isinstance(o, Tensor))

        return one

    def rebuild(self, results: Sequence[Tensor], layouts: Sequence[Layout | None], otherwise: Layout = FIRST) -> Any:
        """The output in its own structure, from its tensors (n, ...). Outputs without examples are those of the first
        one; where layouts are missing, the examples are as in `otherwise`."""
        known = iter(layouts[len(self.flat) :])
        tensors = iter(results)
        rebuilt = []
        for o in self.outputs:
            if not isinstance(o, Tensor):
                rebuilt.append(o)
                continue
            layout, y = next(known, otherwise), next(tensors)
            if layout is None:
                rebuilt.append(y[0])
                continue
            if o.dim() <= layout.dim or (len(layouts) == len(self.flat) and o.shape[layout.dim] != 1):
                raise refuse(
                    self.module,
                    f"for one example it returns a tensor of shape {tuple(o.shape)}, with no dimension of examples",
                    "Return losses and other reductions outside of the attached module",
                )
            rebuilt.append(layout.batch(y))
        return tree_unflatten(rebuilt, self.structure)


@contextmanager
def vmappable(module: nn.Module) -> Iterator[None]:
    """Inside, torch.func.vmap is right where by itself it fails or is silently wrong. Raises: DoesNotVmap."""
    if any(isinstance(child, nn.RNNBase) for child in module.modules()):
        raise DoesNotVmap("torch.func has no batching rule for recurrent layers")
    # Checkpointing inside would only fail in the backward pass. Where hooks are set already, it is around us, and does
    # no harm.
    inside = not saves_through_hooks()
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # about speed
    try:
        # The fused attention kernels have no batching rule.
        with (
            sdpa_kernel(SDPBackend.MATH),
            EmbeddingUnderVmap(),
            disable_saved_tensors_hooks("it uses checkpointing") if inside else nullcontext(),
        ):
            yield
    except CoverageError:
        raise
    except RuntimeError as error:
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise DoesNotVmap(f"{type(module).__name__} does not run under torch.func.vmap ({reason})") from error
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def run(
    call: OverExamples, layouts: Sequence[Layout | None], expanded: dict[str, Tensor], n: int, loops: bool = False
) -> Any:
    """The module over n examples, from its expanded parameters (n, *shape). Refuses what writes to a buffer.

    `layouts` are those of the arguments' leaves, and of the output's tensors (without them: examples first).
    """
    buffers = {id(buffer): (buffer, buffer._version) for buffer in call.module.buffers()}
    one, rows = call.over(layouts), call.mapped(layouts, n)
    if loops:
        # unbind, since the gradient of one entry by index is as large as that of all.
        copies = {name: p.unbind(0) for name, p in expanded.items()}
        outputs = [one({name: p[b] for name, p in copies.items()}, *(x[b] for x in rows)) for b in range(n)]
        results = [torch.stack(parts) for parts in zip(*outputs, strict=True)]
    else:
        with vmappable(call.module):
            results = torch.func.vmap(one, randomness="different")(expanded, *rows)
    for buffer in call.module.buffers():
        if buffers.get(id(buffer), (buffer, -1))[1] != buffer._version:
            raise refuse(
                call.module,
                "its forward writes to a buffer, once for every example instead of once for the batch",
                "Update the buffer outside of the attached module",
            )
    return call.rebuild(results, layouts)
