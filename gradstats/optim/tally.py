"""The examples that the states of many parameters have seen, in one piece of memory: a hundred tensors of one number
each cost a tenth of a small model's step to read and to add to."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import product
from operator import add
from typing import Any

import torch
from torch import Tensor

from gradstats.sums import addressable


class Tally:
    """The "step" of states, or more counts that they have, each an element of one array, and a tensor to those who read
    it, save it or change it in place. It is of the states that were asked for last, for as long as each count lies
    there; of none where tensors are only traced, or are shared with other processes, whose counts they are too."""

    def __init__(self) -> None:
        self.counts = array("q")
        self.addresses: list[int] = []  # of the counts, one by one

    def __len__(self) -> int:
        return len(self.addresses)

    def of(self, states: Sequence[dict[str, Any]], *names: str) -> list[list[int]]:
        """By name, what each state has seen, whoever changed it; from here on in this memory."""
        held = [state[name] for name in names for state in states]
        # Where they lie, not which they are: an assignment to .data moves a tensor, and sending it to a process does.
        if not self.addresses or list(map(Tensor.data_ptr, held)) != self.addresses:
            self.counts, self.addresses = array("q", map(int, held)), []
            if addressable(*held) and not any(count.is_cpu and count.is_shared() for count in held):
                entries = torch.frombuffer(self.counts, dtype=torch.int64).unbind()
                self.addresses = list(map(Tensor.data_ptr, entries))
                for (name, state), entry in zip(product(names, states), entries, strict=True):
                    state[name] = entry
        counts, size = self.counts.tolist(), len(states)
        return [counts[start : start + size] for start in range(0, len(counts), size)]

    def add(self, *numbers: int) -> None:
        """To all of them, in place; a number for each name."""
        size = len(self) // len(numbers)
        self.counts[:] = array("q", map(add, self.counts, [number for number in numbers for _ in range(size)]))
