"""The uses of a parameter by one forward, or by one recomputed part of it: their contributions are summed per example
before they are squared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradstats.sums import accumulation_dtype

if TYPE_CHECKING:
    from gradstats.contribution import Contribution
    from gradstats.joint import Looked


@dataclass(slots=True)
class Uses:
    """Of the parameter called `name`."""

    name: str
    whole: int = 0  # uses that touch all rows of the parameter
    ids: list[Tensor] = field(default_factory=list)  # (n, t) rows that each of the others touches
    parts: list[Contribution | Looked] = field(default_factory=list)  # of the uses backpropagated so far
    units: int = 0  # how many contributions were squared: examples, unless another granularity was asked for
    weight: float = 1.0  # of the sums, where they are over a part of the examples
    gradient: Tensor | None = None  # of the uses backpropagated so far
    dtype: torch.dtype | None = None  # of the parameter as the first use takes it
    task: int = -1  # the run of autograd that has reached a use

    def begin(self) -> None:
        """A use is reached: forgets what a backward pass that was cut short by an exception has left."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.gradient = task, None
            self.parts.clear()

    def take(self, gradient: Tensor) -> bool:
        """Adds a use's gradient to those that the first use returns; unless that is in another precision, or in a low
        one, where autograd sums in the parameter's own."""
        if gradient.dtype != self.dtype or gradient.dtype != accumulation_dtype(gradient.dtype):
            return False
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)
        return True

    def give(self) -> Tensor | None:
        """What `take` has added up, which is forgotten here; None if it took nothing."""
        gradient, self.gradient = self.gradient, None
        return gradient
