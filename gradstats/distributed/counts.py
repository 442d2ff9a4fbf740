"""How much the ranks have backpropagated since the last exchange: a small table, a row a number, a column a rank."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradstats.handle import Handle


@dataclass(frozen=True)
class Counts:
    """By rank."""

    rank: int  # this one
    examples: list[int]
    passes: list[int]  # backward passes, or forwards that they went through
    gathers: list[int]  # whether its sums are gathered: not in every window with attach(..., every=k)
    counted: dict[str, list[int]]  # by parameter: examples, or what else has one contribution

    @staticmethod
    def table(handle: Handle, names: Collection[str], rank: int, ranks: int) -> Tensor:
        """The column of this rank, zeros elsewhere: summed over ranks, the table of all."""
        numbers = [*handle.unsent_examples(), *(handle.unsent_count(name) for name in names)]
        table = torch.zeros(len(numbers), ranks)  # in float32, exact up to 2^24
        table[:, rank] = torch.tensor(numbers, dtype=torch.float32)
        return table

    @classmethod
    def of(cls, table: Tensor, names: Collection[str], rank: int) -> Self:
        """From the table of all. Waits for the device."""
        examples, passes, gathers, *counted = table.round().long().tolist()
        return cls(rank, examples, passes, gathers, dict(zip(names, counted, strict=True)))

    @property
    def gathered(self) -> bool:
        """Whether all ranks that have examples gather their sums."""
        return all(gathers for n, gathers in zip(self.examples, self.gathers, strict=True) if n)

    def sizes_elsewhere(self, passes: list[int]) -> list[float]:
        """Examples of every backward pass of the other ranks, of which each had so many."""
        rows = zip(self.examples, self.passes, passes, strict=True)
        return [n / all_ for rank, (n, all_, m) in enumerate(rows) if rank != self.rank for _ in range(m)]

    def elsewhere(self, numbers: list[int]) -> int:
        """The sum over the other ranks."""
        return sum(numbers) - numbers[self.rank]
