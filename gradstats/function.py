"""The one autograd Function that every leaf computes through; its backward returns statistics as gradients of shadows.

    LeafFunction(shadows..., links..., inputs..., parameters..., token) -> outputs..., link

A parameter that is used several times has its shadows at the first use; every later use takes the first one's `link`,
an output that holds nothing, so that autograd runs the backward of the first use when those of all others are done.
There the contributions of all uses meet, and their gradients, which are added up in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from gradstats.contribution import Contribution
from gradstats.errors import CoverageError
from gradstats.forms.rows import Rows
from gradstats.joint import Looked, look, sums_of
from gradstats.rules import Rule
from gradstats.sums import OF_SQUARES, SUM_OF_SQUARES
from gradstats.twice import arguments_at, gradients_with_graph, placed

if TYPE_CHECKING:
    from gradstats.account import Account
    from gradstats.leaf import Leaf
    from gradstats.uses import Uses

NOTHING = nullcontext()
Gradients = dict[str, Tensor]
Sums = dict[tuple[str, str], Tensor]


class Use(NamedTuple):
    """One parameter in one call of a leaf."""

    account: Account
    uses: Uses
    collects: bool  # the first use, which has the shadows


class Call(NamedTuple):
    """What the backward of a leaf's call must know beside tensors."""

    leaf: Leaf
    rule: type[Rule]
    options: tuple[Any, ...]
    names: tuple[str, ...]  # the rule's parameters, in the order of the arguments
    used: dict[str, Use]  # those that have statistics
    slots: tuple[tuple[str, str], ...]  # (parameter, sum) of every shadow, in the order of the arguments
    links: int
    device: str
    several: bool  # the rule takes a tuple of inputs
    batch_size: int
    fold: int  # consecutive rows an example has
    generation: int


class LeafFunction(torch.autograd.Function):
    """y = rule.forward(x, parameters), whose backward also returns the sums asked for, as gradients of the shadows."""

    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor | None):
        first = len(call.slots) + call.links
        inputs = len(call.rule.inputs)
        x = tensors[first : first + inputs] if call.several else tensors[first]
        parameters = dict(zip(call.names, tensors[first + inputs : -1], strict=True))
        with no_autocast(call.device):
            y, saved = call.rule.forward(call.options, x, parameters)
        ctx.call = call
        ctx.saves = len(saved)
        kept, ctx.places = placed(tensors[first:-1], saved, inputs)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        others = *kept, *tensors
        if not isinstance(y, tuple):
            ctx.outputs = ()
            return changeable(y, others), torch.zeros(())
        ctx.outputs = [(o.shape, o.dtype, o.device) for o in y]
        return *(changeable(o, others) for o in y), torch.zeros(())

    @staticmethod
    def backward(ctx, *d: Tensor | None):
        saved = ctx.saved_tensors  # read once: checkpointing lets nobody unpack them twice
        if not torch.is_grad_enabled():
            return backpropagate(ctx, saved, d)
        if ctx.places is None:
            return once_differentiable(lambda ctx, *d: backpropagate(ctx, saved, d))(ctx, *d)
        with no_autocast(ctx.call.device):
            graphed = gradients_with_graph(ctx.call, arguments_at(ctx.places, saved), d[:-1])
        with torch.no_grad():
            return backpropagate(ctx, saved, d, graphed)


def backpropagate(
    ctx, saved: tuple, d: tuple[Tensor | None, ...], graphed: Sequence[Tensor | None] = ()
) -> tuple[Tensor | None, ...]:
    """The Function's backward. `graphed`: under create_graph=True, the gradients that are returned in place of the
    rule's own, which then serve the statistics only."""
    call: Call = ctx.call
    counts = call.leaf.accumulates()
    grad_input: tuple[Tensor | None, ...] = (None,) * len(call.rule.inputs)
    contributions: dict[str, Contribution] = {}
    with no_autocast(call.device):
        if (counts or not graphed) and any(cotangent is not None for cotangent in d[:-1]):
            needs = ctx.needs_input_grad[1 + len(call.slots) + call.links : -1]
            wanted = frozenset(compress((*call.rule.inputs, *call.names), needs))
            cotangents: Any = filled(ctx.outputs, d[:-1]) if ctx.outputs else d[0]
            grad_input, contributions = differentiate(call, saved[: ctx.saves], cotangents, wanted)
        if counts:
            # Before sums are made: those of the window before are gone by then.
            call.leaf.begin(call.used, contributions, call.batch_size, call.generation)
            gradients, sums = reduce(call, contributions)
        else:
            gradients, sums = {name: c.gradient() for name, c in contributions.items()}, {}
    if graphed:
        grad_input = tuple(graphed[: len(call.rule.inputs)])
        gradients = {name: g for name, g in zip(call.names, graphed[len(grad_input) :], strict=True) if g is not None}
    if counts:
        unshadowed = {key: value for key, value in sums.items() if key not in call.slots}
        call.leaf.record(call.used, call.generation, gradients, unshadowed)
    returned = *grad_input, *map(gradients.get, call.names)
    return None, *map(sums.get, call.slots), *(None,) * call.links, *returned, None


def changeable(y: Tensor, kept: Sequence[Any]) -> Tensor:
    """The output as one that may be changed in place, which autograd allows of no view made in a Function.

    A Linear with positions returns one, of a product that nobody else has: the relation is dropped. It stays where
    what is `kept` shares the memory, since autograd must then tell by its version that it was changed.
    """
    base = y._base
    if base is None or any(isinstance(t, Tensor) and (t is base or t._base is base) for t in kept):
        return y
    return y.data


def filled(outputs: list[tuple[Any, ...]], d: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Cotangents of several outputs: zeros of those that the loss does not use."""
    return tuple(
        torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent
        for (shape, dtype, device), cotangent in zip(outputs, d, strict=True)
    )


def differentiate(
    call: Call, saved: tuple, d: Tensor | tuple[Tensor, ...], wanted: frozenset[str]
) -> tuple[tuple[Tensor | None, ...], dict[str, Contribution]]:
    """The rule's backward: gradients of the inputs, and contributions of examples (or of what else is counted)."""
    granularity, size = call.leaf.handle.granularity, call.leaf.handle.microbatch_size
    grad_input, contributions = call.rule.backward(call.options, saved, d, wanted)
    for name in contributions.keys() & call.used.keys():
        contributions[name].parameter = call.used[name].account.name
        contributions[name].statistics_dtype = call.leaf.handle.statistics_dtype
        if call.fold > 1 and granularity != "token":
            contributions[name] = contributions[name].regroup("microbatch", call.fold)
        if granularity != "example":
            contributions[name] = contributions[name].regroup(granularity, size)
    return grad_input if call.several else (grad_input,), contributions


def reduce(call: Call, contributions: dict[str, Contribution]) -> tuple[Gradients, Sums]:
    """Gradient of every parameter, and the sums of those whose uses have all been here."""
    gradients = {name: c.gradient() for name, c in contributions.items() if name not in call.used}
    sums: Sums = {}
    kinds, lifetime = call.leaf.handle.needs, call.leaf.handle.lifetime
    # What is small comes last in layers, and first here, and each is taken out of `contributions`: it is gone, with its
    # temporaries, when the weight's sums are made.
    for name, (account, uses, collects) in reversed(call.used.items()):
        own, found = contributions.pop(name, None), {}
        uses.begin()
        index = None  # examples that the sums are over, if not all
        if own is not None:
            uses.units = own.count
            index = lifetime.drawn(call.generation, own.count, own.device)
            uses.weight = 1.0 if index is None else own.count / len(index)
        if not collects:
            if own is not None:
                share, waiting = postpone(own, uses, kinds, index)
                uses.parts.append(waiting)
                if not uses.take(share):
                    gradients[name] = share
        elif uses.parts:
            if call.leaf.handle.granularity == "token":
                raise CoverageError(
                    f"parameter '{uses.name}' is used several times in one forward, so a token has no single "
                    f"contribution to it. Use granularity='example', or ignore=['{uses.name}']"
                )
            gradient = uses.give()
            if own is not None:
                gradient = own.gradient() if gradient is None else own.added_to(gradient)
            if gradient is not None:
                gradients[name] = gradient
            if own is not None:
                uses.parts.append(own if index is None else own.subset(index).like(own))
            found = sums_of(uses.parts, kinds)
            uses.parts.clear()
        elif own is not None:
            if index is None and isinstance(own, Rows) and own.writes_squares(kinds):
                own.spare = account.spare(SUM_OF_SQUARES.name)
            gradients[name], found = own.sums(kinds) if index is None else own.sums_over(index, kinds)
        for kind, value in found.items():
            sums[name, kind] = value if uses.weight == 1 else value.mul_(uses.weight)
    return gradients, sums


def postpone(
    own: Contribution, uses: Uses, kinds: tuple[str, ...], index: Tensor | None
) -> tuple[Tensor, Contribution | Looked]:
    """The gradient of a use, and what of it waits for the first use."""
    looked_up = uses.ids and uses.whole == 1 and not isinstance(own, Rows) and OF_SQUARES.issuperset(kinds)
    if index is None:
        return look(own, torch.cat(uses.ids, 1), kinds) if looked_up else (own.gradient(), own)
    part = own.subset(index).like(own)
    return own.gradient(), look(part, torch.cat(uses.ids, 1)[index], kinds)[1] if looked_up else part


def autocast(policy: str | None, device: str, x: Any, parameters: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What torch's autocast would do to this layer, by autograd operations outside of the Function."""
    dtype = autocast_dtype(policy, device)
    if dtype is None:
        return x, parameters
    return tree_map(lambda t: cast(t, dtype), x), {name: cast(p, dtype) for name, p in parameters.items()}


def autocast_dtype(policy: str | None, device: str) -> torch.dtype | None:
    """The dtype in which autocast would run a layer; None: as it is."""
    if policy is None or not torch.is_autocast_enabled(device):
        return None
    if policy == "float32" and device == "cpu":  # where autocast leaves normalisation layers alone
        return None
    return torch.get_autocast_dtype(device) if policy == "low" else torch.float32


def cast(t: Any, dtype: torch.dtype | None) -> Any:
    """Numbers in another dtype; float64 is left alone, as autocast does."""
    narrows = dtype is not None and isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if narrows else t


def no_autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else NOTHING
