"""Raw sums: what is gathered of the contributions of a batch, block by block.

A block holds all examples for some elements of one parameter, c (n, k). A raw sum says what it makes of one block and
how results merge: over the blocks of a parameter, and over accumulation steps. Scale and batch size enter on reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradstats.errors import GradstatsError, LifetimeError

PLAIN, STRIDED = {Tensor, nn.Parameter}, {torch.strided}
layout_of = attrgetter("layout")
# What is asked for several times a layer and step: of a small model, it is calls that a step's time consists of.
ACCUMULATION = {
    dtype: torch.promote_types(dtype, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
# The gradient, and sums by name.
Reduction = tuple[Tensor, dict[str, Tensor]]


def present(found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are not None."""
    return {name: value for name, value in found.items() if value is not None}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which squares are formed and summed: float32, or float64 for float64 parameters."""
    return ACCUMULATION[dtype] if dtype in ACCUMULATION else torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which it may be squared."""
    dtype = accumulation_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)


def addressable(*tensors: Tensor) -> bool:
    """Whether the numbers of tensors are what lies in their memory: no subclass but torch's own of parameters, no lazy
    negation, no implied zeros."""
    plain = PLAIN.issuperset(map(type, tensors)) and STRIDED.issuperset(map(layout_of, tensors))
    return plain and not any(map(Tensor.is_neg, tensors)) and not any(map(Tensor._is_zerotensor, tensors))


class Block(NamedTuple):
    """Contributions of all examples to k elements of a parameter, in float32 or wider."""

    c: Tensor  # (n, k)
    elements: Tensor  # (k,) their places in the flattened parameter
    parameter: str  # its full name


class RawSum(ABC):
    """One quantity gathered in the backward pass.

    `per` says what has an entry of its own in the result:

        "element"   (*shape)        `partial` gives (k,); accumulation steps merge
        "example"   (n, *trailing)  accumulation steps are concatenated
        "pair"      (n, n)          of one backward pass only
        "batch"     (*trailing)     accumulation steps merge

    Results of several blocks merge too, except for "element", where every block has elements of its own.
    """

    name: str
    per: ClassVar[Literal["element", "example", "pair", "batch"]]
    trailing: tuple[int, ...] = ()
    # Whether elements to which no example contributes make no difference, so that blocks of zeros can be left out.
    ignores_zeros: ClassVar[bool] = False

    @abstractmethod
    def partial(self, block: Block) -> Tensor:
        """The result of one block."""

    @staticmethod
    def merge(a: Tensor, b: Tensor) -> Tensor:
        """One result from two, of other blocks or of other accumulation steps."""
        return a + b

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """One result from those of several accumulation steps, or ranks, in their order."""
        if self.per == "example":
            return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return reduce(self.merge, parts)

    @property
    def key(self) -> str:
        """Tells it from other raw sums; equal keys mean equal results."""
        return self.name

    @property
    def persistent(self) -> bool:
        """Whether autograd can add its accumulation steps up."""
        return self.per == "element" and self.merge is RawSum.merge

    def dtype(self, parameter: torch.dtype) -> torch.dtype:
        """Of the result, for a parameter of the given dtype."""
        return accumulation_dtype(parameter)

    def shape(self, count: int, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Of the result, for `count` examples and a parameter of the given shape."""
        return {
            "element": parameter,
            "example": (count, *self.trailing),
            "pair": (count, count),
            "batch": self.trailing,
        }[self.per]

    def accumulate(self, steps: dict[int, Tensor], sizes: dict[int, int]) -> Tensor:
        """The result of a window: `steps` maps generations to results, `sizes` to numbers of examples, in the order of
        the forwards. Examples that did not pass through the layer contribute nothing to it.

        Raises: LifetimeError for sums over pairs of examples that were not backpropagated together.
        """
        if self.per == "example":
            zeros = next(iter(steps.values())).new_zeros
            return self.joined([steps[g] if g in steps else zeros(size, *self.trailing) for g, size in sizes.items()])
        if self.per == "pair" and len(sizes) > 1:
            raise LifetimeError(
                f"{self.name!r} pairs examples of one backward pass, but {len(sizes)} were accumulated: read it after "
                f"each of them and call zero_grad(), or use 'projection', whose inner products estimate it."
            )
        return self.joined(list(steps.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles register again: the process that reads them may know the class only."""
        return revive, (type(self), self.__dict__.copy())


def revive(kind: type[RawSum], state: dict[str, Any]) -> RawSum:
    """A copied or unpickled raw sum, registered."""
    raw = object.__new__(kind)
    raw.__dict__.update(state)
    register(raw)
    return raw


# Leaves keep sums by key.
SUMS: dict[str, RawSum] = {}


def register(raw: RawSum) -> str:
    """Makes a raw sum known by its key, which is returned. Raises: GradstatsError if another class has the key."""
    known = type(SUMS.setdefault(raw.key, raw))
    if (known.__module__, known.__qualname__) != (type(raw).__module__, type(raw).__qualname__):
        raise GradstatsError(
            f"{type(raw).__qualname__} is called {raw.key!r}, as is {known.__module__}.{known.__qualname__}: give it "
            f"another name"
        )
    SUMS[raw.key] = raw
    return raw.key


class Gradient(RawSum):
    """sum_b c_b."""

    name = "gradient"
    per = "element"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.sum(0)


class SumOfSquares(RawSum):
    """sum_b c_b^2."""

    name = "sum_of_squares"
    per = "element"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.square().sum(0)


class SquaredNorms(RawSum):
    """||c_b||^2."""

    name = "squared_norms"
    per = "example"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.square().sum(1)


GRADIENT, SUM_OF_SQUARES, SQUARED_NORMS = Gradient(), SumOfSquares(), SquaredNorms()
# Those for which forms have ways of their own, and which can be mended when another use of the parameter is added.
OF_SQUARES = frozenset({SUM_OF_SQUARES.name, SQUARED_NORMS.name})
register(GRADIENT)
