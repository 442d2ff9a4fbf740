"""The shadow-leaf mechanism: statistics are the gradients of tensors that hold no data.

A leaf is a module that owns parameters. While attached, its forward runs through one autograd Function which takes,
beside its real inputs, a *shadow* for every statistic: a stride-0 tensor of zeros shaped like the statistic, a leaf of
autograd. The backward of the Function returns the statistic as the gradient of the shadow, and autograd does the
bookkeeping that it does for every gradient: accumulation, recomputation under checkpointing, several uses.

Shadows precede the parameters in the argument list: what runs on a parameter's gradient finds the statistic in place.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradstats.contribution import Contribution, accumulation_dtype
from gradstats.errors import CoverageError, LifetimeError
from gradstats.rules import Rule, fallback
from gradstats.statistics import SUMS

if TYPE_CHECKING:
    from gradstats.handle import Handle

LEAF = "_gradstats_leaf"  # where an attached module keeps its Leaf, outside of parameters, buffers and state_dict


def shadow(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the given shape without memory, a leaf of autograd."""
    zero = torch.zeros((), dtype=accumulation_dtype(like.dtype), device=like.device)
    return zero.expand(shape).requires_grad_()


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
        x, parameters = tensors[s], dict(zip(call.names, tensors[s + 1 :], strict=True))
        with no_autocast(next(t.device.type for t in tensors[s:] if t is not None)):
            y, saved = call.rule.forward(call.options, x, parameters)
        ctx.call = call
        ctx.save_for_backward(*saved)
        ctx.shadows = tensors[:s]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d: Tensor):
        call: Call = ctx.call
        s = len(call.slots)
        needs = ctx.needs_input_grad[1:]
        wanted = frozenset(n for n, need in zip(("input", *call.names), needs[s:], strict=True) if need)
        slots = [slot for slot, need in zip(call.slots, needs[:s], strict=True) if need]
        with no_autocast(d.device.type):
            grad_input, contributions = call.rule.backward(call.options, ctx.saved_tensors, d, wanted)
            gradients, sums = reduce(contributions, slots)
        if slots:
            call.leaf.record(call, gradients, dict(zip(call.slots, ctx.shadows, strict=True)))
        return (None, *(sums.get(slot) for slot in call.slots), grad_input, *(gradients.get(n) for n in call.names))


def reduce(
    contributions: dict[str, Contribution], slots: list[tuple[str, str]]
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
    dtype = torch.get_autocast_dtype(device) if policy == "low" else torch.float32
    cast = {name: p if p is None or p.dtype == torch.float64 else p.to(dtype) for name, p in parameters.items()}
    return x if x.dtype == torch.float64 else x.to(dtype), cast


def no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Leaf:
    """What an attached module keeps: its parameters by name, their shadows, and the raw sums gathered so far."""

    def __init__(
        self,
        handle: Handle,
        module: nn.Module,
        prefix: str,
        rule: type[Rule] | None,
        parameters: dict[str, nn.Parameter],
    ):
        self.handle, self.module, self.prefix, self.rule = handle, module, prefix, rule
        self.names = tuple(parameters)  # relative to the module
        self.owners = {name: owner_of(module, name) for name in self.names}
        self._forget()

    def _forget(self) -> None:
        self.shadows: dict[tuple[str, str], Tensor] = {}  # sums shaped like a parameter
        self.example_shadows: dict[
            tuple[str, str], list[tuple[int, Tensor]]
        ] = {}  # first example and shadow of every call
        self.returned: dict[
            str, list[tuple[Tensor, int]]
        ] = {}  # gradients returned in the backward under way, their versions
        self.accounted: set[str] = set()
        self.versions: dict[str, int] = {}  # of p.grad at the end of the last backward
        self.generations: dict[tuple[str, ...], int] = {}  # of the last use that was backpropagated, by its parameters
        self.backward_pass = -1
        self.first = 0  # the first generation that counts
        self.hooks: dict[str, tuple[Tensor, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an attached model is attached to a handle of its own, and has seen nothing yet."""
        kept = ("handle", "module", "prefix", "rule", "names", "owners")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def full_name(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def parameter(self, name: str) -> nn.Parameter:
        parameters, attribute = self.owners[name]
        return parameters[attribute]

    @property
    def active(self) -> bool:
        return torch.is_grad_enabled() and any(self.parameter(name).requires_grad for name in self.names)

    # Forward

    def __call__(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's forward while attached; `kind` is its original class."""
        if self.rule is None:
            return self._vmapped(kind, args, kwargs)
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or self.rule.unbatched(self.module, inputs[0]):
            shapes = ", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i) for i in inputs)
            raise CoverageError(
                f"module '{self.prefix}' ({kind.__name__}) takes one batched tensor while attached, examples in its "
                f"first dimension; got {shapes}. Use x.unsqueeze(0)."
            )
        self.rule.check(self.module)
        x, n = self.handle.examples(self, inputs[0])
        x, parameters = autocast(self.rule.autocast, x, dict(self.module._parameters))
        return self._apply(self.rule, self.rule.options(self.module), x, parameters, n)

    def _vmapped(self, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        if not tensors:
            raise CoverageError(
                f"module '{self.prefix}' ({kind.__name__}) got no tensor that would tell the number of examples"
            )
        _, n = self.handle.examples(self, tensors[0])

        def expand(name: str, n: int) -> Tensor:
            return self._apply(fallback.Expand, (n,), None, {name: self.parameter(name)}, n)

        return fallback.run(self.module, kind, expand, self.names, n, args, kwargs)

    def _apply(
        self, rule: type[Rule], options: tuple[Any, ...], x: Tensor | None, parameters: dict[str, Tensor | None], n: int
    ) -> Tensor:
        """Runs the Function on x and parameters, with the shadows that the handle's statistics need."""
        slots, shadows = [], []
        for name in parameters:
            if name in self.names and self.parameter(name).requires_grad:
                for kind in self.handle.sums:
                    slots.append((name, kind))
                    shadows.append(self.shadow(name, kind, n))
        call = Call(self, rule, options, tuple(parameters), tuple(slots), n, self.handle.begin_forward())
        return LeafFunction.apply(call, *shadows, x, *parameters.values())

    def shadow(self, name: str, kind: str, b: int) -> Tensor:
        p = self.parameter(name)
        if name not in self.hooks or self.hooks[name][0] is not p:
            self.hooks[name] = (p, p.register_hook(lambda g: self.account(name, g)))
            self.handle.register(p, self.full_name(name))
        if SUMS[kind] == "example":
            return shadow((b,), p)
        found = self.shadows.get((name, kind))
        if found is None or found.shape != p.shape or found.device != p.device:
            found = self.shadows[name, kind] = shadow(tuple(p.shape), p)
        return found

    # Backward

    def record(self, call: Call, gradients: dict[str, Tensor], shadows: dict[tuple[str, str], Tensor]) -> None:
        """Called by the Function's backward before anything is accumulated."""
        self.handle.begin_backward(self, call.names, call.batch_size, call.generation)
        for slot, s in shadows.items():
            if SUMS[slot[1]] == "example":
                self.example_shadows.setdefault(slot, []).append((call.generation, s))
        for name, gradient in gradients.items():
            if name in self.hooks:
                # An alias: shares storage, so that autograd cannot add another use's gradient to it in place unseen.
                self.returned.setdefault(name, []).append((gradient.detach(), gradient._version))

    def account(self, name: str, incoming: Tensor) -> None:
        """Compares the gradient that reaches a parameter with what this leaf returned: any other use shows as a
        difference."""
        returned = self.returned.pop(name, [])
        if not returned:
            return
        gradient, version = returned[0]
        if len(returned) == 1 and gradient.data_ptr() == incoming.data_ptr() and version == incoming._version:
            return
        if name in self.accounted and gradient.dtype != incoming.dtype:
            return
        expected = torch.stack([g.to(incoming.dtype) for g, _ in returned]).sum(0)
        # Rounding of a cast or of another order of summation, against an extra use of any consequence.
        tolerance = 1e-3 * expected.abs().max()
        if expected.shape != incoming.shape or bool(((expected - incoming).abs() > tolerance).any()):
            raise CoverageError(
                f"parameter '{self.full_name(name)}' {tuple(incoming.shape)} receives gradient from outside of its "
                f"layer (a functional use of the weight, a penalty added to the loss, or a hook that changes the "
                f"gradient), so its per-example statistics would be incomplete. Use the layer only by calling it, apply penalties in the "
                f"optimizer (weight_decay), or attach(model, engine='vmap')."
            )
        if (
            gradient.dtype != incoming.dtype
        ):  # a cast between leaf and parameter: once seen to be all, not compared again
            self.accounted.add(name)

    def fresh(self) -> bool:
        """Whether the next gradients are the first since zero_grad(), whichever way it zeroed."""
        for name in self.names:
            grad = self.parameter(name).grad
            if grad is not None and (grad._version == self.versions.get(name) or bool(grad.any())):
                return False
        return True

    def remember_versions(self) -> None:
        for name in self.names:
            grad = self.parameter(name).grad
            if grad is not None:
                self.versions[name] = grad._version

    # Reading

    def reset(self, first: int) -> None:
        """Forgets the sums; generations from `first` on count."""
        for s in self.shadows.values():
            s.grad = None
        self.example_shadows.clear()
        self.generations.clear()
        self.first = first

    @property
    def batch_size(self) -> int:
        return sum(size for generation, size in self.handle.sizes.items() if generation >= self.first)

    def value(self, name: str, kind: str) -> Tensor | None:
        """A raw sum over the window, or None if nothing was backpropagated."""
        if SUMS[kind] == "parameter":
            s = self.shadows.get((name, kind))
            return None if s is None else s.grad
        calls = {g: s.grad for g, s in self.example_shadows.get((name, kind), []) if s.grad is not None}
        if not calls:
            return None
        # In the order of the forwards. Examples that did not pass through this layer contribute nothing to it.
        zeros = next(iter(calls.values())).new_zeros
        generations = sorted(g for g in self.handle.sizes if g >= self.first)
        return torch.cat([calls[g] if g in calls else zeros(self.handle.sizes[g]) for g in generations])

    def gradient(self, name: str) -> Tensor | None:
        """p.grad, as the last backward left it."""
        grad = self.parameter(name).grad
        if grad is not None and grad._version != self.versions.get(name):
            raise LifetimeError(
                f"the gradient of '{self.full_name(name)}' was changed in place after the backward pass (clipping, "
                f"unscaling), so it no longer fits the squares. Read this statistic before, and clip with the "
                f"optimizer's max_norm."
            )
        return grad

    def detach(self) -> None:
        for _, hook in self.hooks.values():
            hook.remove()
        self._forget()


def owner_of(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter, and its key there: looked up often, and the parameter may be replaced."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path)._parameters, attribute


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
        leaf: Leaf = self.__dict__[LEAF]
        if not leaf.active:
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
    module.__dict__.pop(LEAF)
    module.__class__ = type(module)._gradstats_original  # type: ignore[attr-defined]
