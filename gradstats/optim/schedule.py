"""Learning-rate schedules in examples: the learning curve does not depend on how the stream is cut into batches.

A schedule is a multiplier f(e) of the learning rate at e examples. The step on the examples from E to E + B takes its
mean over them, in closed form:

    lr = initial_lr (1/B) integral of f from E to E + B

so that the sum of B lr over a stretch of examples is the same for any batch sizes. Pieces follow each other:

    ExampleLR(optimizer, Warmup(10_000).then(Cosine(1_000_000)))
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradstats.errors import GradstatsError
from gradstats.optim.base import ExampleOptimizer


class Schedule(ABC):
    """A multiplier f(e) of the learning rate. Subclasses give its integral and its length, in examples."""

    @property
    @abstractmethod
    def length(self) -> float:
        """Examples until it ends; inf if it does not."""

    @abstractmethod
    def integral(self, start: float, stop: float) -> float:
        """Of f from start to stop; after its end it stays at its last value."""

    def mean(self, start: float, stop: float) -> float:
        """Of f over the examples from start to stop, start < stop."""
        return self.integral(start, stop) / (stop - start)

    def then(self, following: Schedule) -> Schedule:
        """This schedule, and at its end the other, which counts from there. Raises: GradstatsError if it has no end."""
        if math.isinf(self.length):
            raise GradstatsError(f"{self} does not end, so nothing can follow it; give it a number of examples")
        return Then(self, following)


@dataclass(frozen=True)
class Then(Schedule):
    """f(e) = first(e) until its end N, then following(e - N)."""

    first: Schedule
    following: Schedule

    @property
    def length(self) -> float:
        return self.first.length + self.following.length

    def integral(self, start: float, stop: float) -> float:
        n = self.first.length
        before = self.first.integral(min(start, n), min(stop, n))
        return before + self.following.integral(max(start - n, 0), max(stop - n, 0))


@dataclass(frozen=True)
class Constant(Schedule):
    """f(e) = 1, for so many examples."""

    examples: float = math.inf

    def __post_init__(self) -> None:
        if not self.examples >= 0:
            raise GradstatsError(f"{self}: a number of examples is not negative")

    @property
    def length(self) -> float:
        return self.examples

    def integral(self, start: float, stop: float) -> float:
        return stop - start


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """f(e) = sqrt(N / (N + e)) with N = `horizon`.

    Warmup(N).then(InverseSquareRoot(N)) is sqrt(N/e) from N on: Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """

    horizon: float

    def __post_init__(self) -> None:
        if not 0 < self.horizon < math.inf:
            raise GradstatsError(f"{self}: the horizon is a number of examples above zero")

    @property
    def length(self) -> float:
        return math.inf

    def integral(self, start: float, stop: float) -> float:
        # 2 sqrt(N) times the difference of the roots, without cancellation
        n = self.horizon
        return 2 * math.sqrt(n) * (stop - start) / (math.sqrt(n + start) + math.sqrt(n + stop))


@dataclass(frozen=True)
class Transition(Schedule):
    """f(e) = start + (end - start) progress(e), where progress goes from 0 to 1 within so many examples."""

    examples: float
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.examples < math.inf and 0 <= self.start < math.inf and 0 <= self.end < math.inf):
            raise GradstatsError(f"{self}: examples, start and end are finite and not negative")

    @abstractmethod
    def progress(self, start: float, stop: float) -> float:
        """Its mean over the examples from start to stop, start < stop, within the length."""

    @property
    def length(self) -> float:
        return self.examples

    def integral(self, start: float, stop: float) -> float:
        a, b = min(start, self.examples), min(stop, self.examples)
        moving = (b - a) * (self.start + (self.end - self.start) * self.progress(a, b)) if a < b else 0.0
        return moving + (stop - start - (b - a)) * self.end


@dataclass(frozen=True)
class Linear(Transition):
    """progress(e) = e / examples."""

    def progress(self, start: float, stop: float) -> float:
        return (start + stop) / (2 * self.examples)


@dataclass(frozen=True)
class Warmup(Linear):
    """Linear, from 0 to 1."""

    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Cosine(Transition):
    """progress(e) = (1 - cos(pi e / examples)) / 2: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts."""

    def progress(self, start: float, stop: float) -> float:
        middle = math.pi * (start + stop) / (2 * self.examples)
        half = math.pi * (stop - start) / (2 * self.examples)
        return (1 - math.cos(middle) * math.sin(half) / half) / 2


class ExampleLR(LRScheduler):
    """A torch.optim.lr_scheduler.LRScheduler that follows a schedule in examples: for trainers that expect one.

        scheduler = ExampleLR(optimizer, Warmup(10_000).then(Cosine(1_000_000)))

    Every `optimizer.step()` sets each group's lr to initial_lr schedule.mean(E, E + B), E the examples that the
    optimizer has seen before this batch of B. `scheduler.step()` may be called, as often as a trainer likes, and
    changes no learning rate. Before the first step lr is that of a batch of one example.

    Checkpoints: E and initial_lr are in the optimizer's state_dict, which is all that a run needs to continue; the
    schedule itself is not saved, but made anew. Copies and pickles go with their optimizer.

    What else sets lr (a scheduler of torch's on the same optimizer) would be overwritten, and is refused at the next
    step. To change the learning rate of a schedule under way, set group["initial_lr"].

    Raises: GradstatsError for an optimizer that does not count examples, or that follows a schedule already. For
        torch's own optimizers at a constant batch size B, torch has what it takes:
        LambdaLR(optimizer, lambda step: schedule.mean(step * B, (step + 1) * B)).
    """

    optimizer: ExampleOptimizer

    def __init__(self, optimizer: Optimizer, schedule: Schedule):
        if not isinstance(optimizer, ExampleOptimizer):
            raise GradstatsError(
                f"{type(optimizer).__name__} does not count examples: give ExampleLR an optimizer of gradstats.optim "
                f"itself, before a trainer wraps it, or use torch's LambdaLR(optimizer, lambda step: "
                f"schedule.mean(step * B, (step + 1) * B)) with a constant batch size B"
            )
        if not isinstance(schedule, Schedule):
            raise GradstatsError(
                f"ExampleLR follows a Schedule, not {schedule!r}: Warmup(10_000).then(Cosine(1_000_000)), or a "
                f"subclass of your own with its integral"
            )
        self.schedule = schedule
        self._follow(optimizer)
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            group.pop("scheduled_lr", None)  # of another optimizer, from which this one was converted
        self(1)

    def __call__(self, batch_size: int) -> None:
        """Sets the learning rates of a step on so many examples; the optimizer calls it."""
        examples = self.optimizer.examples
        factor = self.schedule.mean(examples, examples + batch_size)
        for index, group in enumerate(self.optimizer.param_groups):
            lr = float(group["lr"])
            if lr != group.get("scheduled_lr", lr):
                raise GradstatsError(
                    f"lr of group {index} was {group['scheduled_lr']} by ExampleLR, and something else made it {lr}, "
                    f"which this step would overwrite: remove the other scheduler, compose schedules with then(), or "
                    f"set group['initial_lr']"
                )
            if isinstance(group["lr"], Tensor):
                group.setdefault("initial_lr", group["lr"].clone())
                group["lr"].fill_(group["initial_lr"] * factor)
            else:
                group["lr"] = group.setdefault("initial_lr", lr) * factor
            group["scheduled_lr"] = float(group["lr"])

    def step(self, epoch: int | None = None) -> None:
        """Counts the call. Raises: GradstatsError for an epoch."""
        if epoch is not None:
            raise GradstatsError("ExampleLR counts examples, which the optimizer knows: call step() without an epoch")
        self._step_count += 1
        self.last_epoch += 1

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of the last step, or the first."""
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def get_lr(self) -> list[float | Tensor]:
        raise GradstatsError(
            "the next learning rate depends on the next batch size: get_last_lr() is the last one; to follow other "
            "schedules, compose with then() rather than SequentialLR"
        )

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "schedule"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow(self.optimizer)

    def _follow(self, optimizer: ExampleOptimizer) -> None:
        if any(isinstance(schedule, ExampleLR) for schedule in optimizer._schedules):
            raise GradstatsError(
                "the optimizer follows a schedule already: compose schedules with then(), or make the optimizer anew"
            )
        optimizer._schedules.append(self)
