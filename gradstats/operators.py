"""What a compiled graph asks of Python while it runs: operators that are opaque to the compiler.

    opened(call, token, n)                                     in the forward: call becomes [generation, n]
    sums(form, operands, token, kinds) -> gradient, sums...    loops over examples, shapes that depend on data
    returned(token, call, results) -> gradient of the token    in the backward, before anything is accumulated

So that generations, windows and refusals are those of the eager leaf. A token is a leaf of autograd whose value is the
number of a Leaf: code that was compiled for one layer serves all layers of its kind.
"""

from __future__ import annotations

import weakref
from itertools import count, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradstats.contribution import Contribution
from gradstats.errors import CoverageError
from gradstats.forms.dense import Dense
from gradstats.forms.outer import Outer
from gradstats.function import Use
from gradstats.sums import OF_SQUARES, SUMS, Reduction
from gradstats.uses import Uses

if TYPE_CHECKING:
    from gradstats.leaf import Leaf

_leaves: weakref.WeakValueDictionary[int, Leaf] = weakref.WeakValueDictionary()
_numbers = count()


def token_of(leaf: Leaf) -> Tensor:
    """A new token for `leaf`."""
    number = next(_numbers)
    _leaves[number] = leaf
    # Not a scalar, whose value Dynamo would take for a constant; exact up to 2^53 leaves.
    return torch.tensor([float(number)], dtype=torch.float64, requires_grad=True)


@torch.library.custom_op("gradstats::opened", mutates_args={"call"})
def opened(call: Tensor, token: Tensor, n: int) -> None:
    """Writes the generation of a leaf's call on n examples, and n, into `call` (2,)."""
    # A mutation: an operator whose result only the backward uses would be moved there.
    leaf = _leaves[int(token)]
    lifetime = leaf.handle.lifetime
    if (exchange := leaf.handle.look_around()) is not None:
        exchange.rides = False  # the graph has shadows, whose gradients may come after the parameters'
    if lifetime.examples not in (None, n):
        raise CoverageError(
            f"{leaf.title} got {n} rows where the batch has {lifetime.examples} examples, and was compiled without the "
            f"model around it. Call stats.probe(*batch) before torch.compile, and compile the whole model"
        )
    for account in leaf.accounts.values():
        if account.trainable:
            account.follow()
    call.copy_(torch.tensor([lifetime.begin_forward(), n]))


@opened.register_fake
def _(call, token, n):
    return None


@torch.library.custom_op("gradstats::returned", mutates_args=())
def returned(
    token: Tensor, call: Tensor, names: str, kinds: str, gradients: list[Tensor], steps: list[Tensor], gathers: bool
) -> Tensor:
    """Records what a leaf's backward returns for the parameters `names`, a line each; `steps` are the sums `kinds` of
    each that autograd does not accumulate. Without `gathers`, nothing but that it was reached."""
    leaf, (generation, n) = _leaves[int(token)], call.tolist()
    accounts = {name: leaf.accounts[name] for name in names.splitlines()}
    if leaf.accumulates() and not gathers:
        leaf.handle.lifetime.begin_plain(leaf, n, generation)
    elif leaf.accumulates():
        used = {name: Use(account, Uses(account.name, units=n), collects=True) for name, account in accounts.items()}
        # Clones, since the compiler reuses the memory of what is no output of the graph.
        clones = dict(zip(product(used, kinds.splitlines()), [step.clone() for step in steps], strict=True))
        leaf.begin(used, used, n, generation)
        leaf.record(used, generation, dict(zip(used, gradients, strict=True)), clones)
    return torch.zeros_like(token)


@returned.register_fake
def _(token, call, names, kinds, gradients, steps, gathers):
    return torch.empty_like(token)


@torch.library.custom_op("gradstats::sums", mutates_args=())
def sums(
    form: str, tensors: list[Tensor], integers: list[int], token: Tensor, call: Tensor, name: str, kinds: str
) -> list[Tensor]:
    """Contribution.sums to the parameter `name` of a leaf, of the form rebuilt from its operands."""
    contribution = Contribution.FORMS[form].of(tensors, integers)
    leaf = _leaves[int(token)]
    contribution.parameter = leaf.accounts[name].name
    contribution.statistics_dtype = leaf.handle.statistics_dtype
    generation, n = call.tolist()
    index, names = leaf.handle.lifetime.drawn(generation, n, contribution.device), kinds.splitlines()
    if index is None:
        gradient, found = contribution.sums(names)
        return [gradient, *(found[kind] for kind in names)]
    gradient, found = contribution.sums_over(index, names)
    return [gradient, *(found[kind] * (contribution.count / len(index)) for kind in names)]


@sums.register_fake
def _(form, tensors, integers, token, call, name, kinds):
    c = Contribution.FORMS[form].of(tensors, integers)
    shapes = [(c.shape, c.dtype)]
    shapes += [(SUMS[kind].shape(c.count, c.shape), SUMS[kind].dtype(c.dtype)) for kind in kinds.splitlines()]
    return [torch.empty(shape, dtype=dtype, device=c.device) for shape, dtype in shapes]


def reduce(
    contribution: Contribution, token: Tensor, call: Tensor, name: str, kinds: tuple[str, ...], draws: bool
) -> Reduction:
    """The gradient and the sums, in the graph where they can be traced; if it `draws`, over a part of the examples."""
    if isinstance(contribution, Dense | Outer) and OF_SQUARES.issuperset(kinds) and not draws:
        return contribution.sums(kinds)
    tensors, integers = contribution.operands
    form = type(contribution).__name__
    gradient, *found = sums(form, list(tensors), list(integers), token, call, name, "\n".join(kinds))
    return gradient, dict(zip(kinds, found, strict=True))
