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


class Unclear(Exception):
    """Why the examples of a tensor cannot be told apart."""


class Mixes(Exception):
    """One example's entries change with the other examples."""


def layout_of(small: Any, x: Any, replaced: Sequence[Any]) -> Layout | None:
    """Where the examples are in x, a tensor of EXAMPLES of them; None if all share it.

    `small` is the same one of an example less; in `replaced` the first, second, ... example gave way to another one.
    Raises: Unclear, Mixes.
    """
    if not isinstance(x, Tensor):
        return None
    if any(other.dim() != x.dim() for other in (small, *replaced)):
        raise Unclear("is called with tensors of a rank that the data decide")
    if padded_to_longest(small, x, replaced):
        small, x, *replaced = alike([small, x, *replaced])
    if any(other.shape != x.shape for other in replaced):
        raise Unclear("is called with rows gathered by what is in them")
    differ = [k for k, (a, b) in enumerate(zip(small.shape, x.shape, strict=True)) if a != b]
    if not differ:
        if any(changed_entries(x, other, None).any() for other in replaced):
            raise Mixes
        return ONE if x.dim() and x.shape[0] == 1 else None
    dim = differ[0]
    if len(differ) > 1 or small.shape[dim] * EXAMPLES != x.shape[dim] * (EXAMPLES - 1):
        raise Unclear("is called with tensors whose sizes are no multiple of the examples'")
    return order_of(x, dim, [changed_entries(x, other, dim) for other in replaced])


def padded_to_longest(small: Tensor, x: Tensor, replaced: Sequence[Tensor]) -> bool:
    """Whether all have the examples in front, and are otherwise as large as the largest of those that they have."""
    if all(other.shape[1:] == x.shape[1:] for other in (small, *replaced)):
        return False
    same = all(other.shape[:1] == x.shape[:1] for other in replaced)
    return same and small.shape[0] * EXAMPLES == x.shape[0] * (EXAMPLES - 1)


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors filled up with zeros to the same size, but for the first dimension."""
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    filled = []
    for t in tensors:
        full = t.new_zeros(t.shape[0], *largest)
        full[tuple(map(slice, t.shape))] = t.detach()
        filled.append(full)
    return filled


def order_of(x: Tensor, dim: int, changes: Sequence[Tensor]) -> Layout:
    """In which order examples run along `dim`, from the entries that changed with the first, second, ... of them."""
    owner = torch.arange(x.shape[dim], device=x.device)
    fold = x.shape[dim] // EXAMPLES
    orders = owner // fold, owner % EXAMPLES  # examples slowest, or fastest
    slowest, fastest = (all(bool((order[c] == j).all()) for j, c in enumerate(changes)) for order in orders)
    if not slowest and not fastest:
        raise Mixes
    if slowest and fastest and fold > 1:
        raise Unclear("is called with examples and positions in one dimension, in an order that does not show")
    return FIRST if slowest and not dim else Layout(dim, fastest=not slowest)


def changed_entries(a: Tensor, b: Tensor, dim: int | None) -> Tensor:
    """Which entries along `dim` of two tensors differ by more than rounding; of all of them without `dim`."""
    if a.is_floating_point():
        slack = ROUNDING * torch.finfo(a.dtype).eps * a.detach().abs().nan_to_num(posinf=0).amax() if a.numel() else 0
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
