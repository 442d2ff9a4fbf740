"""The vmap leaf: any module without a rule, run under torch.func.vmap with one copy of its parameters per example.

Each parameter is expanded to (n, *shape) with stride 0; the gradient of the expanded tensor IS the stack of
contributions c_b. Exact for whatever vmaps, at the price of n copies of the module's gradient during the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradstats.contribution import Dense
from gradstats.errors import CoverageError
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


def check(module: nn.Module) -> None:
    """Raises CoverageError for modules known to couple examples, not to vmap, or to hide the example dimension."""
    for child in module.modules():
        refuse_coupling(child)
        if isinstance(child, nn.RNNBase):
            raise refuse(
                child, "torch.func has no batching rule for recurrent layers", "Leave it out of the attached model"
            )
        if getattr(child, "batch_first", True) is False:
            raise refuse(child, "batch_first=False puts positions before examples", "Build it with batch_first=True")


class Body(nn.Module):
    """Calls the original class's forward, without the module's hooks: those run once, around the vmapped call."""

    def __init__(self, inner: nn.Module, kind: type[nn.Module]):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, *args, **kwargs):
        return self.kind.forward(self.inner, *args, **kwargs)


class OverExamples:
    """A module's forward as a function of parameters and rows, to be mapped over both, an example at a time.

    `rows` are the arguments' tensors with one row an example (n, ...); the others are shared by all examples.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module], args: Any, kwargs: Any, n: int):
        self.module, self.body = module, Body(module, kind)
        self.flat, self.spec = tree_flatten((args, kwargs))
        self.mapped = [has_rows(module, value, n, first=i == 0) for i, value in enumerate(self.flat)]
        self.rows = [value for value, mapped in zip(self.flat, self.mapped, strict=True) if mapped]
        self.output: tuple[list[Any], Any] = ([], None)  # of one example: its leaves and their structure

    def __call__(self, parameters: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, ...]:
        """The output's tensors for one example, without the dimension of examples."""
        row = iter(rows)
        inputs = [next(row).unsqueeze(0) if mapped else v for v, mapped in zip(self.flat, self.mapped, strict=True)]
        args, kwargs = tree_unflatten(inputs, self.spec)
        inner = {f"inner.{name}": p for name, p in parameters.items()}
        outputs, spec = tree_flatten(torch.func.functional_call(self.body, inner, args, kwargs))
        self.output = outputs, spec
        tensors = [o for o in outputs if isinstance(o, Tensor)]
        for o in tensors:
            if o.dim() == 0 or o.shape[0] != 1:
                raise refuse(
                    self.module,
                    f"for one example it returns a tensor of shape {tuple(o.shape)}, with no dimension of examples",
                    "Return losses and other reductions outside of the attached module",
                )
        return tuple(o.squeeze(0) for o in tensors)

    def rebuild(self, results: Iterable[Tensor]) -> Any:
        """The output in its own structure, from its tensors over all examples."""
        outputs, spec = self.output
        tensors = iter(results)
        return tree_unflatten([next(tensors) if isinstance(o, Tensor) else o for o in outputs], spec)


@contextmanager
def vmappable(module: nn.Module) -> Iterator[None]:
    """Inside, torch.func.vmap is right where by itself it fails or is silently wrong; what fails still is refused."""
    try:
        # The fused attention kernels have no batching rule, and checkpointing would only fail in the backward pass.
        with sdpa_kernel(SDPBackend.MATH), EmbeddingUnderVmap(), disable_saved_tensors_hooks("it uses checkpointing"):
            yield
    except CoverageError:
        raise
    except RuntimeError as error:
        raise refuse(
            module, f"it does not run under torch.func.vmap ({error})", "Split it into layers that have rules"
        ) from error


def run(over: OverExamples, expanded: dict[str, Tensor]) -> Any:
    """The module over all examples, from its expanded parameters (n, *shape). Refuses what writes to a buffer."""
    buffers = {id(buffer): (buffer, buffer._version) for buffer in over.module.buffers()}
    with vmappable(over.module):
        results = torch.func.vmap(over, randomness="different")(expanded, *over.rows)
    for buffer in over.module.buffers():
        if buffers.get(id(buffer), (buffer, -1))[1] != buffer._version:
            raise refuse(
                over.module,
                "its forward writes to a buffer, once for every example instead of once for the batch",
                "Update the buffer outside of the attached module",
            )
    return over.rebuild(results)


def compare(over: OverExamples, args: Any, kwargs: Any, n: int) -> None:
    """Refuses a module whose output for an example changes when it sees the example alone.

    What mixes rows, divides by the size of the batch, or shares an argument that happens to have as many rows as the
    batch has examples shows here. A module that draws random numbers is not compared: its two outputs differ anyway.
    """
    module = over.module
    named = {f"inner.{name}": buffer for name, buffer in module.named_buffers()}

    def plain(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        copies = {name: buffer.clone() for name, buffer in named.items()}
        outputs = tree_flatten(torch.func.functional_call(over.body, copies, args, kwargs))[0]
        return [o for o in outputs if isinstance(o, Tensor)]

    devices = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        whole, again = plain(0), plain(1)
        if not all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)):
            return
        expanded = {name: p.expand(n, *p.shape) for name, p in module.named_parameters()}
        alone = [o for o in tree_flatten(run(over, expanded))[0] if isinstance(o, Tensor)]
    for a, b in zip(whole, alone, strict=True):
        # Far above the rounding of another order of summation, far below any coupling of consequence.
        tolerance = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if a.shape != b.shape or bool(((a - b).abs() > tolerance * (1e-6 + a.abs().max())).any()):
            raise refuse(
                module,
                "its output for an example depends on the other examples of the batch, or on how many there are",
                "Keep what mixes examples outside of the attached module",
            )


def has_rows(module: nn.Module, value: Any, n: int, first: bool) -> bool:
    """Whether an argument has one row an example; what all examples share has not."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != n:
        return False
    if n > 1 and not first and value.dim() == 2 and value.shape[1] == n:
        raise refuse(
            module,
            f"an argument of shape {tuple(value.shape)} could be one row an example or a square shared by all",
            "Use another batch size",
        )
    return True
