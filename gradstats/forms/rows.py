"""Contributions to a table of which an example touches few rows: embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from gradstats import kernels
from gradstats.contribution import BLOCK, Contribution
from gradstats.sums import OF_SQUARES, SUM_OF_SQUARES, Block, Reduction, wide


class Rows(Contribution):
    """c_b has few non-zero rows: d (n, t, o) goes to the rows ids (n, t) of a table (rows, o).

    Repeated ids within an example are summed before squaring, without waiting for the device: no size depends on how
    many they are.
    """

    def __init__(self, ids: Tensor, d: Tensor, rows: int):
        self.ids, self.d, self.rows = ids, d, rows
        self.spare: Tensor | None = None  # memory that may be written over
        self.count, self.shape, self.dtype, self.device = d.shape[0], (rows, d.shape[2]), d.dtype, d.device

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.ids, self.d), (self.rows,)

    def gradient(self) -> Tensor:
        return self._table(self.d)

    def added_to(self, gradient: Tensor) -> Tensor:
        return gradient.index_add_(0, self.ids.flatten(), self.d.flatten(0, 1).to(gradient.dtype))

    def example(self, n: int) -> Tensor:
        return self.d.new_zeros(self.shape).index_add_(0, self.ids[n], self.d[n])

    def summed(self) -> Tensor:
        """e (n, t, o): all that an example contributes to the row ids_nt, at the first position that looks it up, and
        zero at the others."""
        n, t = self.ids.shape
        place = torch.arange(n, device=self.device).unsqueeze(1) * t + firsts(self.ids)
        d = wide(self.d).flatten(0, 1)
        return torch.zeros_like(d).index_add_(0, place.flatten(), d).unflatten(0, (n, t))

    def _table(self, values: Tensor, memory: Tensor | None = None) -> Tensor:
        """The sum over positions of values (n, t, o), at their rows."""
        # Nearly all of the time is that of zeros: in memory that the system gives page by page ten times as long.
        if memory is None or memory.dtype != values.dtype:
            memory = values.new_zeros(self.shape)
        else:
            memory.zero_()
        return memory.index_add_(0, self.ids.flatten(), values.flatten(0, 1))

    def writes_squares(self, names: Collection[str]) -> bool:
        """Whether `sums` writes a table of squares, for which it takes what is spare."""
        return SUM_OF_SQUARES.name in names and OF_SQUARES.issuperset(names)

    def direct(self, names: Collection[str]) -> Reduction:
        if kernels.available(self.d):
            from gradstats.kernels import rows

            return rows.sums(self.ids, self.d, self.rows, names)
        found = self._of_squares(names)  # first, so that its temporaries are gone when the gradient, a table, is made
        return self.gradient(), found

    def _of_squares(self, names: Collection[str]) -> dict[str, Tensor]:
        squares, found = self.summed().square_(), {}
        if "sum_of_squares" in names:
            found["sum_of_squares"] = self._table(squares, self.spare)
        if "squared_norms" in names:
            found["squared_norms"] = squares.sum((1, 2))
        return found

    def tile(self, rows: slice, columns: slice) -> Tensor:
        height = rows.stop - rows.start
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        place = torch.where(inside, self.ids - rows.start, 0)
        place = place + torch.arange(self.count, device=self.device).unsqueeze(1) * height
        d = wide(self.d[..., columns]).masked_fill(~inside.unsqueeze(2), 0).flatten(0, 1)
        c = d.new_zeros(self.count * height, d.shape[1]).index_add_(0, place.flatten(), d)
        return c.unflatten(0, (self.count, height))

    def blocks(self, limit: int = BLOCK, zeros: bool = True) -> Iterator[Block]:
        if zeros:
            yield from super().blocks(limit)
            return
        touched, ids = torch.unique(self.ids, return_inverse=True)  # far fewer blocks, for one look at the device
        width = self.shape[1]
        for block in Rows(ids, self.d, len(touched)).blocks(limit):
            row, column = block.elements // width, block.elements % width
            yield block._replace(elements=touched[row] * width + column, parameter=self.parameter)

    def per_token(self) -> Contribution:
        return Rows(self.ids.reshape(-1, 1), self.d.reshape(-1, 1, self.d.shape[2]), self.rows)

    def subset(self, index: Tensor) -> Contribution:
        return Rows(self.ids[index], self.d[index], self.rows)

    def merged(self, size: int) -> Contribution:
        t = size * self.ids.shape[1]
        return Rows(self.ids.reshape(-1, t), self.d.reshape(-1, t, self.d.shape[2]), self.rows)


def firsts(ids: Tensor) -> Tensor:
    """For every position of ids (n, t), the first one of its row that holds the same id."""
    ordered, order = ids.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(ids.shape[1], device=ids.device)
    start = torch.where(fresh, place, 0).cummax(1).values  # of the run of equal ids, in this order
    return torch.empty_like(order).scatter_(1, order, order.gather(1, start))
