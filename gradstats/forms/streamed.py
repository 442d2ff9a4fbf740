"""Contributions of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from gradstats.contribution import Contribution
from gradstats.sums import Reduction, accumulation_dtype, present, wide


class Streamed(Contribution):
    """Contributions formed one example at a time: gradient and sums in one pass, memory of one example's gradient.

    A tile takes its part of every example's contribution, which is formed anew for each tile: a form that can compute a
    part of it alone overrides `tile`.
    """

    def tile(self, rows: slice, columns: slice) -> Tensor:
        parts = (self.example(n).reshape(self._matrix)[rows, columns].clone() for n in range(self.count))
        return torch.stack(list(parts))

    def parts(self) -> Iterator[tuple[slice, Contribution]]:
        """Rows of the parameter, and the contributions to these alone: all at once, where that is not too large."""
        yield slice(None), self

    def direct(self, names: Collection[str]) -> Reduction:
        dtype = accumulation_dtype(self.dtype)
        gradient = torch.zeros(self.shape, dtype=dtype, device=self.device)
        squares = torch.zeros_like(gradient) if "sum_of_squares" in names else None
        norms = torch.zeros(self.count, dtype=dtype, device=self.device) if "squared_norms" in names else None
        for rows, part in self.parts():
            for n in range(self.count):
                c = wide(part.example(n))
                gradient[rows] += c
                if squares is not None:
                    squares[rows].addcmul_(c, c)
                if norms is not None:
                    norms[n] += torch.dot(c.reshape(-1), c.reshape(-1))
        return gradient.to(self.dtype), present({"sum_of_squares": squares, "squared_norms": norms})

    def merged(self, size: int) -> Contribution:
        return Groups(self, size)


class Groups(Streamed):
    """Groups of `size` consecutive examples of another form."""

    def __init__(self, whole: Contribution, size: int):
        self.whole, self.size = whole, size
        self.count, self.shape = whole.count // size, whole.shape
        self.dtype, self.device = whole.dtype, whole.device

    def gradient(self) -> Tensor:
        return self.whole.gradient()

    def subset(self, index: Tensor) -> Contribution:
        members = torch.arange(self.size, device=index.device)
        return Groups(self.whole.subset((index.unsqueeze(1) * self.size + members).flatten()), self.size)

    def example(self, n: int) -> Tensor:
        c = self.whole.example(n * self.size).clone()
        for m in range(n * self.size + 1, (n + 1) * self.size):
            c += self.whole.example(m)
        return c
