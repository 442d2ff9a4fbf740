"""A parameter used several times in a forward: its contributions are summed per example, and squared then.

    c_b = sum_u c_bu,    c_b^2 = sum_u c_bu^2 + cross terms

A tied embedding and head have c_b = h_b + e_b, with h_b in all rows of the table and e_b in those of the example's
tokens. Only there do they meet:

    (h + e)^2 = h^2 + (2 h e + e^2)

so the head is reduced in its own backward, and all that waits for the embedding's is h_b at the rows looked up. Sums
that are not of squares need c_b itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.contribution import Contribution
from gradstats.forms.dense import Dense
from gradstats.forms.outer import Outer, OuterSum
from gradstats.forms.rows import Rows
from gradstats.forms.streamed import Streamed
from gradstats.sums import OF_SQUARES, wide


def sums_of(parts: Sequence[Contribution | Looked], names: Collection[str]) -> dict[str, Tensor]:
    """Sums over the examples of what all uses contribute together."""
    looked_up = [part for part in parts if isinstance(part, Rows)]
    whole = [part for part in parts if not isinstance(part, Rows | Looked)]
    reduced = [part for part in parts if isinstance(part, Looked)]
    if looked_up and (reduced or (whole and OF_SQUARES.issuperset(names))):
        rows = join(looked_up)
        assert isinstance(rows, Rows)
        head = reduced[0] if reduced else look(join(whole), rows.ids, names)[1]
        return head.with_rows(rows)
    return reduced[0].sums if reduced else join([*whole, *looked_up]).sums(names)[1]


def join(parts: Sequence[Any]) -> Contribution:
    """One contribution from those of all uses, in the cheapest form that holds their sum."""
    if len(parts) == 1:
        return parts[0]
    return joined_form(parts).like(parts[0])


def joined_form(parts: Sequence[Any]) -> Contribution:
    if all(isinstance(part, Rows) for part in parts):
        return Rows(torch.cat([p.ids for p in parts], 1), torch.cat([p.d for p in parts], 1), parts[0].rows)
    if all(isinstance(part, Outer | OuterSum) for part in parts):
        d, a = zip(*(positions(part) for part in parts), strict=True)
        return OuterSum(torch.cat(d, 1), torch.cat(a, 1))
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.stack([part.c for part in parts]).sum(0))
    return Total(parts)


def positions(part: Outer | OuterSum) -> tuple[Tensor, Tensor]:
    """d (n, t, o) and a (n, t, i)."""
    return (part.d.unsqueeze(1), part.a.unsqueeze(1)) if isinstance(part, Outer) else (part.d, part.a)


class Total(Streamed):
    """Uses of several forms, added an example or a tile at a time."""

    def __init__(self, summands: Sequence[Contribution]):
        self.summands = summands
        first = summands[0]
        self.count, self.shape, self.dtype, self.device = first.count, first.shape, first.dtype, first.device

    def example(self, n: int) -> Tensor:
        return torch.stack([c.example(n) for c in self.summands]).sum(0)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return torch.stack([wide(c.tile(rows, columns)) for c in self.summands]).sum(0)

    def subset(self, index: Tensor) -> Contribution:
        return Total([c.subset(index) for c in self.summands])

    def gradient(self) -> Tensor:
        return torch.stack([c.gradient() for c in self.summands]).sum(0)


class Looked:
    """A use that is reduced already: its sums, and h (n, t, i), its values at the rows that other uses look up.

    `ids` (n, t) are these rows, in order, as often as they are looked up.
    """

    def __init__(self, sums: dict[str, Tensor], ids: Tensor, h: Tensor):
        self.sums, self.ids, self.h = sums, ids, h

    def with_rows(self, looked_up: Rows) -> dict[str, Tensor]:
        """The sums after e has been added, at rows that are among `ids`."""
        e = looked_up.summed()  # (n, t', i)
        place = torch.searchsorted(self.ids, looked_up.ids.contiguous())
        h = self.h.gather(1, place.unsqueeze(2).expand_as(e))
        change = e * (2 * h + e)
        if "sum_of_squares" in self.sums:
            self.sums["sum_of_squares"].index_add_(0, looked_up.ids.flatten(), change.flatten(0, 1))
        if "squared_norms" in self.sums:
            self.sums["squared_norms"].add_(change.sum((1, 2))).clamp_(min=0)
        return self.sums


def look(head: Contribution, ids: Tensor, names: Collection[str]) -> tuple[Tensor, Looked]:
    """Reduces `head`, keeping its values at the rows ids (n, t): its gradient, and what waits for the lookups."""
    gradient, sums = head.sums(names)
    ids = ids.reshape(head.count, -1).sort(dim=1).values
    return gradient, Looked(sums, ids, at_rows(head, ids))


def at_rows(contribution: Contribution, ids: Tensor) -> Tensor:
    """c_n at the rows ids (n, t) of the parameter: (n, t, i)."""
    if isinstance(contribution, Outer | OuterSum):
        d, a = positions(contribution)  # (n, s, o), (n, s, i)
        d = d.gather(2, ids.unsqueeze(1).expand(-1, d.shape[1], -1))
        return wide(d).mT @ wide(a)
    return torch.stack([wide(contribution.example(n)[ids[n]]) for n in range(contribution.count)])
