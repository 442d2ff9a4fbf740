"""The examples that the states of many parameters have seen, in one piece of memory: a hundred tensors of one number
each cost a tenth of a small model's step to read and to add to."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.sums import addressable


class Tally:
    """The "step" of states, each an element of one array, and a tensor to those who read it, save it or change it in
    place. It is of the states that were asked for last, for as long as each one's "step" lies there; of none where
    tensors are only traced, or are shared with other processes, whose counts they are too."""

    def __init__(self) -> None:
        self.counts = array("q")
        self.addresses: list[int] = []  # of the counts, one by one

    def __len__(self) -> int:
        return len(self.addresses)

    def of(self, states: Sequence[dict[str, Any]]) -> list[int]:
        """What each has seen, whoever changed it; from here on in this memory."""
        held = [state["step"] for state in states]
        # Where they lie, not which they are: an assignment to .data moves a tensor, and sending it to a process does.
        if not self.addresses or list(map(Tensor.data_ptr, held)) != self.addresses:
            if not addressable(*held) or any(step.is_cpu and step.is_shared() for step in held):
                self.addresses = []
                return list(map(int, held))
            self.counts = array("q", map(int, held))
            entries = torch.frombuffer(self.counts, dtype=torch.int64).unbind()
            self.addresses = list(map(Tensor.data_ptr, entries))
            for state, entry in zip(states, entries, strict=True):
                state["step"] = entry
        return self.counts.tolist()

    def add(self, number: int) -> None:
        """To all of them, in place."""
        self.counts[:] = array("q", [count + number for count in self.counts])
