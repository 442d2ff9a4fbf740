"""Where the examples are in a tensor, and how to bring them to the front.

Rules see rows: the first dimension has n f rows, the f rows of an example next to each other. A tensor with the
examples in another dimension, or flattened together with positions in either order, is brought to rows by views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` has an entry an example; or, `folded`, n f of them: f consecutive ones an example, or, if
    `fastest`, every n-th one.

    `one`: it has a single entry, which all examples share; it is repeated for each of them. `new`: all examples share
    the tensor, which is repeated for each of them in a dimension in front.
    """

    dim: int = 0
    folded: bool = False
    fastest: bool = False
    one: bool = False
    new: bool = False

    @property
    def repeats(self) -> bool:
        return self.one or self.new

    def fits(self, x: Tensor, n: int) -> bool:
        """Whether x can have its n examples there."""
        if self.new:
            return True
        size = x.shape[self.dim]
        return size == n or n == 1 or (self.one and size == 1) or (self.folded and size % n == 0)

    def met(self, other: Layout) -> Layout | None:
        """The layout of which both are cases, if there is one: an entry an example is the case f = 1 of any order."""
        if self == other or (self.one and other == FIRST):
            return self
        if other.one and self == FIRST:
            return other
        if self.dim != other.dim or self.repeats or other.repeats or (self.folded and other.folded):
            return None
        return self if self.folded else other

    def rows(self, x: Tensor, n: int) -> Tensor:
        """x (.., n f, ..) as (n f, ...), examples slowest."""
        if self.new:
            return x.expand(n, *x.shape)
        if self.one and x.shape[0] == 1:
            return x.expand(n, *x.shape[1:])
        if self.dim:
            x = x.movedim(self.dim, 0)
        if self.fastest and x.shape[0] != n:
            x = x.unflatten(0, (-1, n)).transpose(0, 1).flatten(0, 1)
        return x

    def restore(self, y: Tensor, n: int) -> Tensor:
        """Undoes `rows`; what was repeated stays so."""
        if self.fastest and y.shape[0] != n:
            y = y.unflatten(0, (n, -1)).transpose(0, 1).flatten(0, 1)
        return y.movedim(0, self.dim) if self.dim else y

    def examples(self, x: Tensor, n: int) -> Tensor:
        """x as (n, ...): an entry an example, in which its f rows are in the place of the dimension."""
        return self.rows(x, n).unflatten(0, (n, -1)).movedim(1, self.dim + 1)

    def batch(self, examples: Tensor) -> Tensor:
        """Undoes `examples`."""
        return self.restore(examples.movedim(self.dim + 1, 1).flatten(0, 1), len(examples))


FIRST = Layout()
ONE = Layout(one=True)
NEW = Layout(new=True)


def brought(x: Any, layout: Layout | None, n: int) -> Any:
    """An input as rows, the examples in front; what all examples share is repeated for each."""
    if not isinstance(x, Tensor):
        return x
    if layout is not None:
        return layout.rows(x, n)
    return x.expand(n, *x.shape[1:]) if x.shape[0] == 1 else x
