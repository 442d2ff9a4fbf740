"""What is not a sum over examples: an entry an example, or merged otherwise (maxima). All ranks get what each has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradstats.distributed.parcel import packed
from gradstats.sums import RawSum


class Item(NamedTuple):
    """One result of one rank, if it has any."""

    raw: RawSum
    mine: Tensor | None
    shapes: list[tuple[int, ...]]  # by rank
    dtype: torch.dtype
    device: torch.device

    @property
    def room(self) -> int:
        """Numbers that every rank sends: one that tells whether it has a result, and the largest of all."""
        return 1 + max(map(math.prod, self.shapes))

    def written(self) -> Tensor:
        """(room,)"""
        row = torch.zeros(self.room, dtype=self.dtype, device=self.device)
        if self.mine is not None:
            row[0] = 1
            row[1 : 1 + self.mine.numel()] = self.mine.reshape(-1)
        return row

    def read(self, rows: Tensor, rank: int) -> Tensor | None:
        """The result of a rank from all rows (ranks, room)."""
        shape = self.shapes[rank]
        if self.raw.per != "example" and not bool(rows[rank, 0]):
            return None
        return rows[rank, 1 : 1 + math.prod(shape)].reshape(shape).to(self.dtype)


def gathered(items: Mapping[Any, Item], group: dist.ProcessGroup, ranks: int) -> dict[Any, Tensor]:
    """Results of all ranks put together, in the order of the ranks, by one all-gather."""
    mine = packed({key: item.written() for key, item in items.items()}).flat
    every = mine.new_empty(ranks, len(mine))
    dist.all_gather(list(every), mine, group=group)
    found, place = {}, 0
    for key, item in items.items():
        own = every[:, place : place + item.room]
        place += item.room
        parts = [part for rank in range(ranks) if (part := item.read(own, rank)) is not None]
        if parts:
            found[key] = item.raw.joined(parts).to(item.device)
    return found
