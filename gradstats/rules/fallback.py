"""The vmap leaf: any module without a rule, run under torch.func.vmap with one copy of its parameters per example.

Each parameter is expanded to (n, *shape) with stride 0; the gradient of the expanded tensor IS the stack of
contributions c_b. Exact for whatever vmaps, at the price of n copies of the module's gradient during the backward. What
does not vmap (recurrent layers, control flow that depends on data) runs once an example, in a loop.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from gradstats.contribution import Dense
from gradstats.errors import CoverageError
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


class Constants(TorchFunctionMode):
    """Constants for random numbers, so that two forwards that draw different ones can be compared."""

    DRAWN = frozenset({"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "poisson"})
    IN_PLACE = frozenset({"normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name in self.IN_PLACE:
            return args[0].fill_(0.5)
        result = func(*args, **kwargs)
        return torch.full_like(result, 0.5) if name in self.DRAWN else result


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
    inside = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
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


def compare(
    call: OverExamples, layouts: Sequence[Layout | None], n: int, loops: bool = False, gradient: bool = True
) -> bool:
    """Refuses a module whose output for an example, or its gradient, changes when it sees the example alone.

    What mixes rows, divides by the size of the batch, or shares an argument that happens to have as many rows as the
    batch has examples shows here, and so do wrong batching rules of torch. A module that draws random numbers in
    training is compared in evaluation mode, and with constants for random numbers where that does not help. Returns
    whether it draws any.
    """
    module = call.module
    training = {child: child.training for child in module.modules()}
    devices = {p.device for p in module.parameters() if p.is_cuda}
    leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def plain(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return tensors_in(call.plain(leaves | {name: buffer.clone() for name, buffer in buffers.items()}))

    def alone() -> list[Tensor]:
        expanded = {name: p.expand(n, *p.shape) for name, p in leaves.items()}
        return tensors_in(tree_leaves(run(call, layouts, expanded, n, loops)))

    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            whole = plain(0)
            constants: AbstractContextManager = nullcontext()
            random = not same(whole, plain(1))
            if random:
                module.eval()
                whole = plain(0)
                if not same(whole, plain(1)):
                    constants = Constants()
                    with constants:
                        whole = plain(0)
            with constants:
                found = alone()
            if not close(whole, found):
                raise differs(module, "its output")
            if gradient and not close(*gradients(whole, found, leaves), together=True):
                raise differs(module, "the gradient of its output")
    finally:
        for child, mode in training.items():
            child.training = mode
    return random


def gradients(whole: list[Tensor], found: list[Tensor], leaves: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of a sum of the outputs, weighted entry by entry, once for either way to compute them."""
    wanted = [p for p in leaves.values() if p.requires_grad]
    results: list[list[Tensor]] = []
    for outputs in (whole, found):
        reached = [(o, a) for o, a in zip(outputs, whole, strict=True) if o.requires_grad and a.dim()]
        if not reached or not wanted:
            return [], []
        # Where all examples share one entry in the one way, they have one each in the other: a share of its weight.
        weights = [
            torch.arange(a.numel(), device=o.device).cos().reshape(a.shape).expand_as(o).to(o) * len(a) / len(o)
            for o, a in reached
        ]
        try:
            given = torch.autograd.grad([o for o, _ in reached], wanted, weights, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):  # which torch.autograd.grad cannot differentiate
                return [], []
            raise
        results.append([torch.zeros_like(p) if g is None else g for g, p in zip(given, wanted, strict=True)])
    return results[0], results[1]


def check_loop(call: OverExamples, output: Any) -> None:
    """Refuses a loop over examples that does something else than the module with all of them: control flow on the
    batch."""
    whole = [o.detach() for o in tensors_in(call.plain({}))]
    if not close(whole, [o.detach() for o in tensors_in(tree_leaves(output))]):
        raise differs(call.module, "its output")


def close(whole: list[Tensor], found: list[Tensor], together: bool = False) -> bool:
    """Whether tensors agree, each of their rows on its own scale or on a thousandth of the tensor's; `together`: each
    tensor on its own scale or on a thousandth of that of the largest."""
    whole, found = [a.detach() for a in whole], [b.detach() for b in found]
    largest = max((float(a.abs().max()) for a in whole if a.numel()), default=0.0) if together else 0.0
    for a, b in zip(whole, found, strict=True):
        # Far above the rounding of another order of summation, far below any coupling of consequence.
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(a.dtype, 5e-2)
        if torch.is_autocast_enabled(a.device.type):
            tolerance = 5e-2
        if not a.is_floating_point():
            a, b = a.double(), b.double()
        if a.shape[:1] == (1,) and a.shape[1:] == b.shape[1:]:
            a = a.expand_as(b)  # shared by all examples, and repeated for each
        if a.shape != b.shape:
            return False
        if a.numel() == 0:
            continue
        size = a.abs()
        own = size.amax(tuple(range(1, a.dim())), keepdim=True) if a.dim() > 1 and not together else size.max()
        if bool(((a - b).abs() > tolerance * (1e-6 + 1e-3 * max(largest, float(size.max())) + own)).any()):
            return False
    return True


def differs(module: nn.Module, what: str) -> CoverageError:
    return refuse(
        module,
        f"{what} for an example depends on the other examples of the batch, or on how many there are",
        "Keep what mixes examples outside of the attached module",
    )


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
