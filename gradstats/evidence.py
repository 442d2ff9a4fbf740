"""What a few forwards with few examples say about one tensor: where the examples are in it, and whether they mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gradstats.layout import FIRST, ONE, Layout

EXAMPLES = 3  # the fewest of which one can be replaced and two others stay
ROUNDING = 16  # changes up to so many units in the last place of the largest entry are none

SHARED: frozenset[Layout | None] = frozenset([None])


class Unclear(Exception):
    """Why the examples of a tensor cannot be told apart."""


class Mixes(Exception):
    """One example's entries change with the other examples."""


def layouts_of(small: Any, x: Any, other: Any, example: int) -> frozenset[Layout | None]:
    """Where the examples can be in x, a tensor of EXAMPLES of them; None: all share it.

    `small` is the same one of an example less; in `other` number `example` gave way to another one. Raises: Unclear,
    Mixes.
    """
    if not isinstance(x, Tensor):
        return SHARED
    if small.dim() != x.dim() or other.dim() != x.dim():
        raise Unclear("is called with tensors of a rank that the data decide")
    if padded_to_longest(small, x, other):
        small, x, other = alike([small, x, other])
    if other.shape != x.shape:
        raise Unclear("is called with rows gathered by what is in them")
    differ = [k for k, (a, b) in enumerate(zip(small.shape, x.shape, strict=True)) if a != b]
    if not differ:
        if changed_entries(x, other, None).any():
            if not x.dim():
                raise Mixes
            raise Unclear("is called with something that does not run over the examples, and yet changes with them")
        return frozenset([ONE]) if x.dim() and x.shape[0] == 1 else SHARED
    dim = differ[0]
    if len(differ) > 1 or small.shape[dim] * EXAMPLES != x.shape[dim] * (EXAMPLES - 1):
        raise Unclear("is called with tensors whose sizes are no multiple of the examples'")
    return orders_of(x, dim, changed_entries(x, other, dim), example)


def orders_of(x: Tensor, dim: int, changed: Tensor, example: int) -> frozenset[Layout | None]:
    """In which orders the examples can be along `dim`, from the entries that changed with one of them."""
    entry = torch.arange(x.shape[dim], device=x.device)[changed]
    fold = x.shape[dim] // EXAMPLES
    if fold == 1:
        layouts = {FIRST if dim == 0 else Layout(dim): entry}
    else:
        layouts = {Layout(dim, folded=True): entry // fold, Layout(dim, folded=True, fastest=True): entry % EXAMPLES}
    found: set[Layout | None] = {layout for layout, owner in layouts.items() if bool((owner == example).all())}
    if not found:
        raise misplaced(entry, fold)
    return frozenset(found)


def misplaced(entry: Tensor, fold: int) -> Exception:
    """What it means that other entries changed than are the example's own: more than it has is coupling, as many or
    fewer can be its own in another order, such as that of a gather."""
    if entry.numel() > fold:
        return Mixes()
    return Unclear("is called with rows gathered by what is in them, or in an order that is not known")


def met(one: frozenset[Layout | None], other: frozenset[Layout | None]) -> frozenset[Layout | None]:
    """Layouts that two pieces of evidence about the same tensor have in common. Raises: Unclear if there are none."""
    found: set[Layout | None] = set()
    for a in one:
        for b in other:
            if a is None or b is None:
                if a is b:
                    found.add(a)
            elif (both := a.met(b)) is not None:
                found.add(both)
    if not found:
        raise Unclear("is called with the examples in different places")
    return frozenset(found)


def padded_to_longest(small: Tensor, x: Tensor, other: Tensor) -> bool:
    """Whether all have the examples in front, and are otherwise as large as the largest of those that they have."""
    if small.shape[1:] == x.shape[1:] == other.shape[1:]:
        return False
    return other.shape[:1] == x.shape[:1] and small.shape[0] * EXAMPLES == x.shape[0] * (EXAMPLES - 1)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors filled up with zeros to the same size, but for the first dimension."""
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    filled = []
    for t in tensors:
        full = t.new_zeros(t.shape[0], *largest)
        full[tuple(map(slice, t.shape))] = t.detach()
        filled.append(full)
    return filled


def changed_entries(a: Tensor, b: Tensor, dim: int | None) -> Tensor:
    """Which entries along `dim` of two tensors differ by more than rounding; of all of them without `dim`.

    Rounding is relative to the largest entry of the same feature, the last dimension: features differ in scale.
    """
    if a.is_floating_point() and a.numel():
        size = a.detach().abs().nan_to_num(posinf=0)
        largest = size.amax(tuple(range(a.dim() - 1)), keepdim=True) if a.dim() > 1 else size
        slack = ROUNDING * torch.finfo(a.dtype).eps * largest
        differ = ~((a - b).abs() <= slack) & ~(a == b) & ~(a.isnan() & b.isnan())
    else:
        differ = a != b
    return differ if dim is None else differ.movedim(dim, 0).flatten(1).any(1) if a.dim() > 1 else differ


def nudge(output: Any, example: int) -> Any:
    """Tensors (n, ...) with one example's entry changed."""
    if example < 0:
        return output

    def one(o: Any) -> Any:
        if not isinstance(o, Tensor) or not o.is_floating_point():
            return o
        noise = torch.zeros_like(o)
        noise[example] = 1 + o[example].detach().abs()
        return o + noise

    return tree_map(one, output)
