"""What each example contributes to the gradient of one parameter, kept in its cheapest form.

    c_b = dL/dtheta_b        (n, *shape)   contribution of example b, never stored for all b unless it is small
    sum_b c_b                (*shape)      the gradient
    sum_b c_b^2              (*shape)      "sum_of_squares"
    ||c_b||^2                (n,)          "squared_norms"

A layer rule says which form its parameters have (forms/). A form reduces itself to the gradient and to the two sums
above, sharing the work between them; any other sum sees blocks of the contributions of all examples to some elements.
No block exceeds BLOCK numbers, so that a sum may need all examples at once (a median, inner products of pairs) without
n x parameter in memory. Sums are in float32 or wider whatever the dtype of the layer: squares overflow float16.

Index letters in every file: n example, t position, i input, o output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from math import prod
from typing import ClassVar, Self

import torch
from torch import Tensor

from gradstats.errors import CoverageError
from gradstats.sums import GRADIENT, OF_SQUARES, SUMS, Block, RawSum, Reduction, wide

# Elements of a block, n x k; and on the CPU, where what is made of one should find it in a second-level cache.
BLOCK = 2**20
CACHED = 2**18


class Contribution(ABC):
    """Contributions of all examples of a batch to one parameter's gradient."""

    count: int  # examples, or what else counts as one after `regroup`
    shape: tuple[int, ...]  # of the parameter
    dtype: torch.dtype
    device: torch.device
    parameter: str = ""  # its full name, where it is known
    statistics_dtype: torch.dtype | None = None  # of products that serve sums of positive terms; None: exact

    FORMS: ClassVar[dict[str, type[Contribution]]] = {}  # by name

    def __init_subclass__(cls) -> None:
        Contribution.FORMS[cls.__name__] = cls

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Tensors and integers from which `of` makes the same again, where a compiled graph runs."""
        raise CoverageError(f"parameter '{self.parameter}': {type(self).__name__} is not for torch.compile")

    @classmethod
    def of(cls, tensors: Sequence[Tensor], integers: Sequence[int]) -> Contribution:
        """The form with these `operands`."""
        return cls(*tensors, *integers)

    # What a form provides

    @abstractmethod
    def gradient(self) -> Tensor:
        """sum_b c_b, shaped like the parameter."""

    def added_to(self, gradient: Tensor) -> Tensor:
        """The same, added in place to what other uses of the parameter contribute."""
        return gradient.add_(self.gradient())

    @abstractmethod
    def example(self, n: int) -> Tensor:
        """c_n, shaped like the parameter; may be overwritten by the next call."""

    @abstractmethod
    def tile(self, rows: slice, columns: slice) -> Tensor:
        """c (n, r, k) of a part of the parameter, seen as a matrix of shape[0] rows."""

    def closed(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the sums called `names` that have a formula which needs no example's contribution."""
        return {}

    def direct(self, names: Collection[str]) -> Reduction:
        """The gradient and those of OF_SQUARES that are named, in one pass that is faster than over blocks."""
        return self.from_blocks(names)

    def per_token(self) -> Contribution:
        """Contributions of every position by itself. Raises: CoverageError where positions cannot be told apart."""
        raise CoverageError(
            f"parameter '{self.parameter}' {self.shape}: what a single position contributes to it is not at hand "
            f"({type(self).__name__}). Use granularity='example', or ignore=['{self.parameter}']"
        )

    @abstractmethod
    def subset(self, index: Tensor) -> Contribution:
        """Contributions of the examples at `index` (m,)."""

    @abstractmethod
    def merged(self, size: int) -> Contribution:
        """Contributions of groups of `size` consecutive examples."""

    # What follows

    def like(self, other: Contribution) -> Self:
        """This one, called and computed as `other` is."""
        self.parameter, self.statistics_dtype = other.parameter, other.statistics_dtype
        return self

    def sums(self, names: Collection[str]) -> Reduction:
        """The gradient and the sums called `names`, in the cheapest way."""
        found = self.closed(names)
        rest = [name for name in names if name not in found]
        if not rest:
            return self.gradient(), found
        gradient, others = self.direct(rest) if OF_SQUARES.issuperset(rest) else self.from_blocks(rest)
        return gradient, found | others

    def sums_over(self, index: Tensor, names: Collection[str]) -> Reduction:
        """The gradient of all examples, and the sums over those at `index` (m,)."""
        part = self.subset(index).like(self)
        found = part.closed(names)
        rest = [name for name in names if name not in found]
        return self.gradient(), found | (part.sums(rest)[1] if rest else {})

    def from_blocks(self, names: Collection[str]) -> Reduction:
        """The gradient and any sums, from blocks of all examples and some elements."""
        raws = [GRADIENT, *(SUMS[name] for name in names)]
        blocks = self.blocks(zeros=not all(raw.ignores_zeros for raw in raws))
        found = gather(raws, blocks, self.count, self.shape, self.dtype, self.device)
        return found.pop(GRADIENT.key).to(self.dtype), found

    def blocks(self, limit: int = BLOCK, zeros: bool = True) -> Iterator[Block]:
        """Contributions of all examples, at most `limit` numbers at a time (but one element at least).

        Without `zeros`, elements to which no example contributes may be left out.
        """
        height, width = self._matrix
        if self.device.type == "cpu":
            limit = min(limit, CACHED)
        for rows, columns in tiles(height, width, limit // max(1, self.count)):
            row, column = (torch.arange(s.start, s.stop, device=self.device) for s in (rows, columns))
            elements = (row.unsqueeze(1) * width + column).flatten()
            yield Block(wide(self.tile(rows, columns)).flatten(1), elements, self.parameter)

    @property
    def _matrix(self) -> tuple[int, int]:
        """The shape of the parameter as a matrix."""
        return (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)

    def regroup(self, granularity: str, size: int | None = None) -> Contribution:
        """Contributions of what `granularity` counts as one: an example, a position ("token"), or `size` consecutive
        examples ("microbatch").

        Raises: CoverageError where positions cannot be told apart, or if the last group would be short.
        """
        if granularity == "example":
            return self
        if granularity == "token":
            regrouped = self.per_token()
        elif not size or self.count % size:
            raise CoverageError(
                f"parameter '{self.parameter}' {self.shape}: {self.count} examples are not a whole number of "
                f"micro-batches of {size}. Choose a microbatch_size that divides the batch"
            )
        else:
            regrouped = self.merged(size)
        return regrouped.like(self)


def gather(
    raws: Sequence[RawSum],
    blocks: Iterable[Block],
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Raw sums by key, over the blocks of a parameter of the given shape and dtype and `count` examples."""
    found: dict[str, Tensor] = {}
    for block in blocks:
        for raw in raws:
            partial = raw.partial(block)
            if raw.per == "element":
                if raw.key not in found:
                    found[raw.key] = partial.new_zeros(prod(shape))
                found[raw.key][block.elements] = partial
            else:
                found[raw.key] = raw.merge(found[raw.key], partial) if raw.key in found else partial
    results = {}
    for raw in raws:
        size = raw.shape(count, shape)
        result = found[raw.key] if raw.key in found else torch.zeros(size, device=device)  # no element at all
        results[raw.key] = result.reshape(size).to(raw.dtype(dtype))
    return results


def tiles(height: int, width: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix with at most `limit` elements each, whole rows where they fit."""
    k = min(width, max(1, limit))
    r = max(1, limit // max(k, 1))
    for row in range(0, height, r):
        for column in range(0, width, k):
            yield slice(row, min(row + r, height)), slice(column, min(column + k, width))
