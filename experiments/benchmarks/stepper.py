"""One way to take a training step's gradient and statistics, in units in which all ways can be compared.

For contributions c_b, which sum to the batch gradient, g_b = B c_b of a mean loss:

    second_moment  q  = (1/B) sum_b g_b^2 = B sum_b c_b^2      by parameter
    variance       s2 = B/(B-1) (q - m^2)                      by parameter
    norms          ||g_b|| = B ||c_b|| of the whole gradient   (B,)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gradstats
from experiments.benchmarks.workloads import Problem
from gradstats import matmul
from gradstats.engines.fused import FusedHandle

Found = dict[str, dict[str, Tensor]]  # by statistic, then by parameter; of the whole gradient under TOTAL
TOTAL = ""
PROBES = 8  # they come at calls 1, 2, 4, ...: this many are over before call 2^8
ALL = ("second_moment", "norms", "variance")


class Stepper(ABC):
    """`step` ends with the batch gradient and the statistics in hand; `clear` is before the next one, and not timed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.batch_size = len(problem.x)
        self.forward: Callable[[Tensor], Tensor] = problem.model

    @abstractmethod
    def step(self) -> None: ...

    def clear(self) -> None:
        self.problem.model.zero_grad()

    def settle(self) -> None:
        """Gets over with what only the first steps are to do."""

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.problem.parameters().items() if p.grad is not None}

    def statistics(self) -> Found:
        """Of the last step."""
        return {}

    def losses(self) -> Tensor:
        """Of the batch, (B,)."""
        return self.problem.losses_of(self.forward, self.problem.x, self.problem.y)


class Plain(Stepper):
    """Forward and backward, and no statistics."""

    def __init__(self, problem: Problem, compiled: bool = False) -> None:
        super().__init__(problem)
        if compiled:
            self.forward = torch.compile(problem.model)

    def step(self) -> None:
        self.losses().mean().backward()


class Attached(Stepper):
    """gradstats. The second moment is left as the sums that an optimizer takes; what is made of more than one sum is
    read within the step."""

    def __init__(self, problem: Problem, *names: str, compiled: bool = False, **options: Any) -> None:
        super().__init__(problem)
        self.handle = gradstats.attach(problem.model, *names, **options)
        self.names = names
        self.found: Found = {}
        if compiled:
            self.probe()
            self.forward = torch.compile(problem.model)

    def probe(self) -> None:
        with self.problem.autocast():
            self.handle.probe(self.problem.x)

    def settle(self) -> None:
        if isinstance(self.handle, FusedHandle):
            for _ in range(PROBES):
                self.probe()

    def step(self) -> None:
        self.backward()
        self.found = {name: self.read(name) for name in self.names if name != "second_moment"}

    def backward(self) -> None:
        self.losses().mean().backward()

    def clear(self) -> None:
        super().clear()
        self.found = {}

    def read(self, name: str) -> dict[str, Tensor]:
        entries = self.handle.read(name)
        return {TOTAL: entries.total} if name == "norms" else {p: entries[p] for p in self.problem.parameters()}

    def statistics(self) -> Found:
        return {name: self.read(name) for name in self.names}


class Rounded(Attached):
    """Statistics in bfloat16, even where being exact is as fast. Raises: NotImplementedError where attach would have
    them exact, for want of instructions."""

    def __init__(self, problem: Problem) -> None:
        refuse_without_instructions(problem.x.device)
        super().__init__(problem, "second_moment", statistics_dtype=torch.bfloat16)

    def backward(self) -> None:
        with matmul.forced():
            super().backward()


def refuse_without_instructions(device: torch.device) -> None:
    if not matmul.supports(device, torch.bfloat16):
        raise NotImplementedError(f"no bfloat16 instructions on this {'GPU' if device.type == 'cuda' else 'processor'}")


class Micro(Attached):
    """Engine "microbatch": a backward pass for each of `parts` micro-batches, by default of one example."""

    def __init__(self, problem: Problem, parts: int | None = None) -> None:
        super().__init__(problem, "second_moment", engine="microbatch")
        self.parts = self.batch_size if parts is None else min(parts, self.batch_size)

    def backward(self) -> None:
        rows = self.batch_size // self.parts
        for x, y in zip(self.problem.x.split(rows), self.problem.y.split(rows), strict=True):
            self.problem.losses_of(self.forward, x, y).mean().div(self.parts).backward()


class Signs(Attached):
    """Engine "random_sign", which takes the losses of the examples."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, "second_moment", engine="random_sign")

    def backward(self) -> None:
        self.handle.backward(self.losses())
