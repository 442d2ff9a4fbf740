"""The shadow-leaf mechanism: statistics are the gradients of tensors that hold no data.

A leaf is a module that owns parameters. While attached, its forward runs through one autograd Function which takes,
beside its real inputs, a *shadow* for every statistic: a stride-0 tensor of zeros shaped like the statistic, a leaf of
autograd. The backward of the Function returns the statistic as the gradient of the shadow, and autograd does the
bookkeeping that it does for every gradient: accumulation, recomputation under checkpointing, several uses.

Shadows precede the parameters in the argument list: what runs on a parameter's gradient finds the statistic in place.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gradstats.account import Account, shadow
from gradstats.contribution import Contribution
from gradstats.errors import CoverageError
from gradstats.lifetime import tensors_of
from gradstats.rules import Rule, fallback
from gradstats.rules.registry import checked

if TYPE_CHECKING:
    from gradstats.engines.fused import FusedHandle

LEAF = "_gradstats_leaf"  # where an attached module keeps its Leaf, outside of parameters, buffers and state_dict


class Call(NamedTuple):
    """One use of a leaf: what its backward must know beside tensors."""

    leaf: Leaf
    rule: type[Rule]
    options: tuple[Any, ...]
    names: tuple[str, ...]  # parameters, in the order of the arguments
    slots: tuple[tuple[str, str], ...]  # (parameter, sum) of every shadow, in the order of the arguments
    batch_size: int
    generation: int


class LeafFunction(torch.autograd.Function):
    """y = rule.forward(x, parameters), whose backward also returns the sums asked for, as gradients of the shadows."""

    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor | None) -> Tensor:
        s = len(call.slots)
        x, parameters = tensors[s], dict(zip(call.names, tensors[s + 1 : -1], strict=True))
        with no_autocast(next(t.device.type for t in tensors[s:] if t is not None)):
            y, saved = call.rule.forward(call.options, x, parameters)
        ctx.call = call
        ctx.save_for_backward(*saved)
        ctx.shadows = dict(zip(call.slots, tensors[:s], strict=True))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d: Tensor):
        call: Call = ctx.call
        s = len(call.slots)
        needs = ctx.needs_input_grad[1 + s : -1]
        wanted = frozenset(n for n, need in zip(("input", *call.names), needs, strict=True) if need)
        slots = call.slots if call.leaf.accumulates() else ()
        with no_autocast(d.device.type):
            grad_input, contributions = call.rule.backward(call.options, ctx.saved_tensors, d, wanted)
            gradients, sums = reduce(contributions, slots)
        if slots:
            call.leaf.record(call, gradients, ctx.shadows)
        returned = *(sums.get(slot) for slot in call.slots), grad_input, *(gradients.get(name) for name in call.names)
        return None, *returned, None


def reduce(
    contributions: dict[str, Contribution], slots: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """Gradient of every parameter, and the sums of those that have shadows."""
    gradients, sums = {}, {}
    for name, contribution in contributions.items():
        names = [kind for parameter, kind in slots if parameter == name]
        if names:
            gradients[name], found = contribution.sums(names)
            sums.update({(name, kind): value for kind, value in found.items()})
        else:
            gradients[name] = contribution.gradient()
    return gradients, sums


def autocast(
    policy: str | None, x: Tensor, parameters: Mapping[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What torch's autocast would do to this layer, by autograd operations outside of the Function."""
    device = x.device.type
    if policy is None or not torch.is_autocast_enabled(device):
        return x, dict(parameters)
    if policy == "float32" and device == "cpu":  # where autocast leaves normalisation layers alone
        return x, dict(parameters)
    dtype = torch.get_autocast_dtype(device) if policy == "low" else torch.float32
    cast = {name: p if p is None or p.dtype == torch.float64 else p.to(dtype) for name, p in parameters.items()}
    return x if x.dtype == torch.float64 else x.to(dtype), cast


def no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Leaf:
    """What an attached module keeps: its rule and the accounts of its parameters."""

    def __init__(
        self, handle: FusedHandle, module: nn.Module, prefix: str, rule: type[Rule] | None, names: Sequence[str]
    ):
        self.handle, self.module, self.prefix, self.rule = handle, module, prefix, rule
        self.accounts = {name: self._account(name) for name in names}
        self._forget()

    def _account(self, name: str) -> Account:
        path, _, attribute = name.rpartition(".")
        full = f"{self.prefix}.{name}" if self.prefix else name
        return Account(self.handle, self.module.get_submodule(path), attribute, full)

    def _forget(self) -> None:
        self._sentinel: Tensor | None = None
        self._accumulator: Any = None  # the node that would accumulate the sentinel's gradient
        self._compared: set[Any] = set()  # kinds of calls for which the vmapped forward was compared with the plain one

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("handle", "module", "prefix", "rule", "accounts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def title(self) -> str:
        """What errors call this leaf."""
        return f"module '{self.prefix}' ({type(self.module).__name__})"

    @property
    def served_by(self) -> str:
        return f"rule {self.rule.__name__}" if self.rule else f"vmap over {type(self.module).__name__}"

    @property
    def active(self) -> bool:
        """Whether statistics are wanted of this call; not under functional_call, whose tensors are no parameters."""
        if not torch.is_grad_enabled():
            return False
        trainable = [a.parameter for a in self.accounts.values() if a.trainable]
        return bool(trainable) and all(isinstance(p, nn.Parameter) for p in trainable)

    # Forward

    def __call__(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's forward while attached; `kind` is its original class."""
        if self.rule is None:
            return self._vmapped(kind, args, kwargs)
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or self.rule.unbatched(self.module, inputs[0]):
            shapes = ", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i) for i in inputs)
            raise CoverageError(
                f"{self.title} takes one batched tensor while attached, examples in its first dimension; got {shapes}. "
                f"Use x.unsqueeze(0)."
            )
        checked(self.prefix, self.rule.check, self.module)
        x, n = self.handle.lifetime.examples(self, inputs[0])
        x, parameters = autocast(self.rule.autocast, x, dict(self.module._parameters))
        return self._apply(self.rule, self.rule.options(self.module), x, parameters, n)

    def _vmapped(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = tensors_of(args, kwargs)
        if not tensors:
            raise CoverageError(f"{self.title} got no tensor that would tell the number of examples")
        checked(self.prefix, fallback.check, self.module)
        n = self.handle.lifetime.examples(self, tensors[0])[1]
        over = fallback.OverExamples(self.module, kind, args, kwargs, n)
        call = (tuple(over.mapped), self.module.training)
        if n > 1 and call not in self._compared:
            fallback.compare(over, args, kwargs, n)
            self._compared.add(call)
        expanded = {
            name: self._apply(fallback.Expand, (n,), None, {name: a.parameter}, n) for name, a in self.accounts.items()
        }
        return fallback.run(over, expanded)

    def _apply(
        self, rule: type[Rule], options: tuple[Any, ...], x: Tensor | None, parameters: dict[str, Tensor | None], n: int
    ) -> Tensor:
        """Runs the Function on x and parameters, with the shadows that the handle's statistics need."""
        slots, shadows = [], []
        for name in parameters:
            account = self.accounts.get(name)
            if account is not None and account.trainable:
                for kind in self.handle.needs:
                    slots.append((name, kind))
                    shadows.append(account.shadow_of(kind, n))
        if self._sentinel is None:
            self._sentinel = shadow((), torch.zeros(()))
            self._accumulator = self._sentinel.view_as(self._sentinel).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        call = Call(self, rule, options, tuple(parameters), tuple(slots), n, self.handle.lifetime.begin_forward())
        return LeafFunction.apply(call, *shadows, x, *parameters.values(), self._sentinel)

    # Backward

    def accumulates(self) -> bool:
        """Whether this backward pass accumulates into every leaf of autograd, unlike torch.autograd.grad."""
        return torch._C._will_engine_execute_node(self._accumulator)

    def record(self, call: Call, gradients: dict[str, Tensor], shadows: dict[tuple[str, str], Tensor]) -> None:
        """Called by the Function's backward before anything is accumulated."""
        used = [name for name in gradients if (name, self.handle.needs[0]) in shadows]
        accounts = [self.accounts[name] for name in used]
        self.handle.lifetime.begin_backward(self.title, accounts, call.batch_size, call.generation)
        for name in used:
            own = {kind: s for (parameter, kind), s in shadows.items() if parameter == name}
            self.accounts[name].record(call.generation, gradients[name], own)


@torch.compiler.disable
def uncompiled(leaf: Leaf, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A graph break around every leaf: its bookkeeping is Python, and would be traced anew at every step."""
    return leaf(kind, args, kwargs)


# The class swap


@cache
def attached_class(kind: type) -> type:
    """A subclass of `kind` whose forward goes through the module's Leaf. Its name is the original's, so nothing prints
    differently."""

    def forward(self, *args, **kwargs):
        leaf: Leaf | None = self.__dict__.get(LEAF)
        if leaf is None or not leaf.active:
            return kind.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return uncompiled(leaf, kind, args, kwargs)
        return leaf(kind, args, kwargs)

    def __reduce_ex__(self, protocol):
        """Pickles and copies as the original class plus the swap, since this class has no importable name."""
        reduced = kind.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is type(self):
            return (new_attached, (kind, *reduced[1][1:]), *reduced[2:])
        return reduced

    namespace = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    swapped = type(kind.__name__, (kind,), namespace)
    swapped.__qualname__ = kind.__qualname__
    swapped._gradstats_original = kind  # type: ignore[attr-defined]
    return swapped


def new_attached(kind: type[nn.Module], *args) -> nn.Module:
    cls = attached_class(kind)  # type: ignore[arg-type]
    return cls.__new__(cls, *args)


def swap(module: nn.Module, leaf: Leaf) -> None:
    """Makes `module` compute through `leaf`."""
    if "forward" in module.__dict__:
        raise CoverageError(
            f"module '{leaf.prefix}' ({type(module).__name__}) has a forward set on the instance, which a class swap "
            f"cannot see. Put it into a subclass, or attach before the tool that patches it."
        )
    module.__dict__[LEAF] = leaf
    module.__class__ = attached_class(type(module))  # type: ignore[arg-type]


def unswap(module: nn.Module) -> None:
    """Undoes `swap`. A class put on top of ours since then (a parametrization) stays, and finds no leaf any more."""
    module.__dict__.pop(LEAF, None)
    if "_gradstats_original" in type(module).__dict__:
        module.__class__ = type(module)._gradstats_original  # type: ignore[attr-defined]
