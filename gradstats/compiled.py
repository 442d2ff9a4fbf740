"""Leaves under torch.compile: the same rules and contributions, traced into the graph; the bookkeeping stays Python.

Dynamo traces `forward` where Leaf.__call__ and Caller.__call__ run otherwise, and turns what it reads into guards: so
nothing is read here that differs from step to step. A size is read off a tensor, a number through the module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradstats.caller import Caller
from gradstats.errors import CoverageError
from gradstats.function import autocast_dtype, cast, changeable, no_autocast
from gradstats.layout import FIRST, brought
from gradstats.operators import opened, reduce, returned
from gradstats.rules import Rule
from gradstats.rules.registry import checked, refuse_coupling
from gradstats.sums import SUMS

if TYPE_CHECKING:
    from gradstats.leaf import Leaf


class Constants(NamedTuple):
    """What the Function must know beside tensors."""

    rule: type[Rule]
    options: tuple[Any, ...]
    names: tuple[str, ...]  # parameters, in the order of the arguments
    dtype: torch.dtype | None  # that autocast casts parameters to
    used: tuple[str, ...]  # parameters that have statistics
    kinds: tuple[str, ...]  # sums
    slots: tuple[tuple[str, str], ...]  # (parameter, sum) of every shadow, in the order of the arguments
    statistics_dtype: torch.dtype | None
    draws: bool  # sums are over a part of the examples
    gathers: bool  # this window is


class CompiledLeafFunction(torch.autograd.Function):
    """LeafFunction as Dynamo can trace it: its context holds tensors and constants only."""

    @staticmethod
    def forward(ctx, constants: Constants, call: Tensor, token: Tensor, *tensors: Any):
        first = len(constants.slots)
        inputs = tensors[first : first + len(constants.rule.inputs)]
        own = dict(zip(constants.names, tensors[first + len(constants.rule.inputs) :], strict=True))
        parameters = {name: cast(p, constants.dtype) for name, p in own.items()}
        with no_autocast(inputs[0].device.type):
            y, saved = constants.rule.forward(constants.options, inputs if len(inputs) > 1 else inputs[0], parameters)
        ctx.constants = constants
        ctx.dtypes = [None if p is None else p.dtype for p in own.values()]
        ctx.save_for_backward(token, call, *saved)
        kept = *saved, *tensors
        return changeable(y, kept) if isinstance(y, Tensor) else tuple([changeable(o, kept) for o in y])

    @staticmethod
    def backward(ctx, *d: Tensor):
        constants: Constants = ctx.constants
        token, call, *saved = ctx.saved_tensors
        asked = (*constants.rule.inputs, *constants.names)
        needs = ctx.needs_input_grad[3 + len(constants.slots) :]
        wanted = frozenset(name for name, need in zip(asked, needs, strict=True) if need)
        cotangents = d if len(d) > 1 else d[0]
        with no_autocast(d[0].device.type):
            grad_input, contributions = constants.rule.backward(constants.options, tuple(saved), cotangents, wanted)
            gradients, found = {}, {}
            for name, contribution in contributions.items():
                if name in constants.used and constants.gathers:
                    contribution.statistics_dtype = constants.statistics_dtype
                    gradient, results = reduce(contribution, token, call, name, constants.kinds, constants.draws)
                    found.update({(name, kind): result for kind, result in results.items()})
                else:
                    gradient = contribution.gradient()
                # As it will arrive at the parameter, since that is compared.
                gradients[name] = gradient.to(ctx.dtypes[constants.names.index(name)])
        steps = [kind for kind in constants.kinds if not SUMS[kind].persistent]
        counted = [name for name in gradients if name in constants.used]
        done = returned(
            token,
            call,
            "\n".join(counted),
            "\n".join(steps),
            [gradients[name] for name in counted],
            [found[name, kind] for name in counted for kind in steps],
            constants.gathers,
        )
        grad_input = grad_input if len(constants.rule.inputs) > 1 else (grad_input,)
        own = [gradients.get(name) for name in constants.names]
        return None, None, done, *[found.get(slot) for slot in constants.slots], *grad_input, *own


def forward(
    server: Leaf | Caller, module: nn.Module, kind: type[nn.Module], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """The forward of an attached module while Dynamo traces."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():  # what is exported is the model as it was
        return kind.forward(module, *args, **kwargs)
    if isinstance(server, Caller):
        return outermost(server, module, partial(kind.forward, module), args, kwargs)
    rule = traceable(server)
    if rule is None:
        return server.compiling(kind, args, kwargs)
    own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
    if not own or not all(isinstance(p, nn.Parameter) for p in own):  # frozen, or under functional_call
        return kind.forward(module, *args, **kwargs)
    return outermost(server, module, partial(ruled, server, rule, module, kind), args, kwargs)


def outermost(
    server: Leaf | Caller, module: nn.Module, body: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """body(*args, **kwargs), noted as an outermost call if none is under way."""
    lifetime = server.handle.lifetime
    if lifetime.root is not None:
        return body(*args, **kwargs)
    for norm in server.handle.batch_norms:
        refuse_coupling(norm)
    dim = server.handle.example_dims
    if not isinstance(dim, int):
        raise CoverageError("example_dims by argument cannot be compiled as a whole: compile parts of the model")
    first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > dim)
    lifetime.enter_traced(module, first.movedim(dim, 0) if dim else first)
    try:
        return body(*args, **kwargs)
    finally:
        lifetime.leave(module)


def traceable(leaf: Leaf) -> type[Rule] | None:
    """The rule of a leaf whose calls go into the graph; those of other leaves break it."""
    if leaf.handle.shards is not None:
        return None
    once = all((account.uses or 1) == 1 for account in leaf.accounts.values())
    if leaf.rule is not None and issubclass(leaf.rule, Rule) and once and leaf.handle.granularity == "example":
        return leaf.rule
    return None


def ruled(leaf: Leaf, rule: type[Rule], module: nn.Module, kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Leaf.__call__ for a rule. Raises: CoverageError for a call that the probe has not seen."""
    checked(leaf.prefix, rule.check, module)
    x = rule.bind(module, *args, **kwargs)
    inputs = x if isinstance(x, tuple) else (x,)
    layouts = leaf.layouts.get(tuple([i.dim() if isinstance(i, Tensor) else None for i in inputs]))
    if layouts is None:
        raise CoverageError(f"{leaf.title} has not seen such a call: run stats.probe(*batch) before torch.compile")
    first = leaf.handle.lifetime.first
    n = inputs[0].shape[0] if first is None else first.shape[0]  # None: only a part of the model is compiled
    rows = [i if layout is FIRST else brought(i, layout, n) for i, layout in zip(inputs, layouts, strict=True)]
    known = [(i, layout) for i, layout in zip(rows, layouts, strict=True) if layout is not None]
    if any(layout.folded or i.shape[0] != n for i, layout in known):  # positions among the examples, or a wrong size
        return leaf.compiling(kind, args, kwargs)
    gathers = leaf.handle.lifetime.turns.gathers
    own, kinds = module._parameters, leaf.handle.needs if gathers else ()
    used = tuple(name for name, p in own.items() if p is not None and p.requires_grad and name in leaf.accounts)
    slots = tuple((name, kind) for name in used for kind in kinds if SUMS[kind].persistent)
    dtype = autocast_dtype(rule.autocast, rows[0].device.type)
    with torch.no_grad():
        opened(leaf.call, leaf.token, n)
    y = CompiledLeafFunction.apply(
        Constants(
            rule,
            rule.options(module),
            tuple(own),
            dtype,
            used,
            kinds,
            slots,
            leaf.handle.statistics_dtype,
            leaf.handle.sampling.fraction < 1,
            gathers,
        ),
        leaf.call.clone(),
        leaf.token,
        *[leaf.accounts[name].ready_shadow_of(kind) for name, kind in slots],
        *[cast(i, dtype) for i in rows],
        *own.values(),
    )
    return y if layouts[0] is FIRST or layouts[0] is None else layouts[0].restore(y, n)
