"""Engine "microbatch": squares of the gradients of whole backward passes, for any model.

Every backward pass between two zero_grad() is one micro-batch of b examples, and what it adds to p.grad is its
contribution c_i; M of them make B = M b examples. With h_i the mean gradient of a micro-batch,

    h_i = (scale/b) c_i        scale = B for a mean loss, 1 for a sum loss
    Q_b = (1/M) sum_i h_i^2    E Q_b = mu^2 + sigma^2/b

Neither layers nor examples are looked into, so that what mixes examples (BatchNorm in training) is served too: sigma^2
is then the variance that independent examples would have, if the mean of b of them scattered as micro-batches do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradstats.arguments import ExampleDims
from gradstats.contribution import Dense
from gradstats.coverage import ignored, table
from gradstats.engines.passes import Pass, Passes
from gradstats.errors import CoverageError, GradstatsError, LifetimeError, MissingStatistic
from gradstats.function import no_autocast
from gradstats.gradient import Left, fresh, untouched
from gradstats.handle import Handle, handle_of
from gradstats.reading import ByParameter
from gradstats.statistics import SecondMoment, SimpleNoiseScale, Variance, Wanted
from gradstats.sums import GRADIENT, SQUARED_NORMS, SUMS, wide
from gradstats.window import Statistic

# Statistics of single examples that micro-batches estimate without bias.
ESTIMATED = (SecondMoment, Variance, SimpleNoiseScale)


@dataclass
class Sums:
    """Of one parameter, over the backward passes since its gradient was last None."""

    first: int  # the first of these passes
    totals: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # sums with an entry a pass
    left: Left | None = None  # p.grad after the last pass
    unseen: bool = False  # p.grad holds more than the passes added

    def add(self, index: int, found: dict[str, Tensor]) -> None:
        for key, value in found.items():
            if SUMS[key].per == "example":
                self.steps.setdefault(key, {})[index] = value
            else:
                self.totals[key] = SUMS[key].merge(self.totals[key], value) if key in self.totals else value


class MicrobatchHandle(Handle):
    """Gathers raw sums over backward passes.

    With granularity "example", the sum of c_b^2 over examples is estimated, without bias, from the micro-batches':

        sum_b c_b^2 ~ C^2/B + k (sum_i c_i^2 / b - C^2/B)        C = sum_i c_i = p.grad        k = (B - 1)/(M - 1)

    so that the variance is s2 = (Q_b - m^2)/(1/b - 1/B), and the second moment q = m^2 + s2 (B - 1)/B. With b = 1 both
    are exact. With granularity "microbatch" every statistic is that of the M mean gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Wanted],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        example_dims: ExampleDims = 0,
        granularity: str = "example",
        microbatch_size: int | None = None,
    ):
        super().__init__(model, statistics, loss_reduction, granularity, microbatch_size)
        if granularity == "token":
            raise GradstatsError("engine 'microbatch' has no positions: use engine='fused'")
        for statistic in self.statistics.values():
            self._check(statistic)
        if any(handle_of(p) is not None for p in model.parameters()):
            raise GradstatsError("the model is attached already: use gradstats.attached(model), or detach() it first")
        self._ignored = ignored(model, ignore)
        if not any(p.requires_grad for name, p in model.named_parameters() if name not in self._ignored):
            raise CoverageError(f"{type(model).__name__} has no trainable parameters")
        self._declared_size = microbatch_size
        self._count = 0  # backward passes so far
        self._sizes: dict[int, int] = {}  # examples of each of them in this window
        self._sums: dict[str, Sums] = {}
        self._passes = Passes(self, self._ignored, example_dims)

    def _check(self, statistic: Statistic) -> None:
        """Raises: GradstatsError for what micro-batches cannot tell."""
        if self.granularity == "example" and not isinstance(statistic, ESTIMATED):
            raise GradstatsError(
                f"{statistic.name!r} of single examples cannot be estimated without bias from gradients of "
                f"micro-batches: {', '.join(repr(s.name) for s in ESTIMATED)} can. Use engine='fused', or "
                f"granularity='microbatch' for that of the micro-batches"
            )
        if any(raw.per == "pair" for raw in statistic.needs):
            raise GradstatsError(
                f"{statistic.name!r} needs the gradients of all micro-batches at once, and engine 'microbatch' keeps "
                f"none: use engine='fused', or 'projection', whose inner products estimate it"
            )

    # Backward

    def fresh(self, name: str) -> bool:
        """Whether the next gradient is the first since zero_grad(), whichever way it zeroed."""
        left = self.left(name)
        return fresh(self.parameters()[name].grad, left.state if left is not None else None)

    def untouched(self, name: str) -> bool:
        """Whether p.grad is as the last backward pass left it."""
        left = self.left(name)
        return left is not None and untouched(self.parameters()[name].grad, left.state)

    @torch.no_grad()
    def commit(self, ended: Pass) -> None:
        """Adds a backward pass. Raises: LifetimeError, and forgets all, if its examples cannot be told."""
        trainable = [name for name, p in self.parameters().items() if p.requires_grad]
        if all(name in ended.began if name in ended.arrived else self.fresh(name) for name in trainable):
            self.zero()
        try:
            examples = self._passes.examples(ended.forwards)
        except LifetimeError:
            self.zero()
            raise
        self._count += 1
        self._sizes[self._count] = examples
        if self.granularity == "example":
            self.microbatch_size = examples
        for name, gradient in ended.arrived.items():
            if name in ended.began or name not in self._sums:
                self._sums[name] = Sums(self._count)
            sums = self._sums[name]
            sums.unseen |= name in ended.changed
            contribution = Dense(gradient.to_dense().unsqueeze(0))
            contribution.parameter = name
            with no_autocast(gradient.device.type):
                c, found = contribution.sums(self.needs)
            sums.add(self._count, found | {GRADIENT.key: wide(c)} if self.granularity == "example" else found)
            grad = self.parameters()[name].grad
            sums.left = None if grad is None else self.note(grad)

    def new_examples(self) -> None:
        self._passes.new_examples()

    # Reading

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._passes.parameters

    def read(self, statistic: Wanted) -> ByParameter:
        entries = super().read(statistic)
        self._check(entries.statistic)
        return entries

    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        if self._passes.current is not None:
            raise LifetimeError(
                "a backward pass is under way, or was cut short by an exception: read statistics after it, or call "
                "zero_grad() and backpropagate again"
            )
        own = self._sums.get(name)
        if own is None:
            raise MissingStatistic(
                f"parameter '{name}' has no statistics: no backward pass has reached it since they were last zeroed. "
                f"Call loss.backward() on what the attached model returns"
            )
        if own.unseen:
            raise LifetimeError(
                f"the gradient of '{name}' holds more than these statistics have seen: it was changed between two "
                f"backward passes, or is older than attach. Call zero_grad() before the first backward pass"
            )
        sizes = {index: size for index, size in self._sizes.items() if index >= own.first}
        b, m = self._size(sizes), len(sizes)
        found = {
            need: SUMS[need].accumulate(own.steps[need], dict.fromkeys(sizes, 1))
            if SUMS[need].per == "example"
            else own.totals[need]
            for need in needs
        }
        if self.granularity == "microbatch":
            return found, m
        whole = own.totals[GRADIENT.key].square()
        return {need: of_examples(need, found[need], whole, b, m) for need in needs}, b * m

    def _size(self, sizes: dict[int, int]) -> int:
        """b. Raises: LifetimeError if micro-batches differ in it."""
        found = sorted(set(sizes.values()))
        if len(found) > 1:
            raise LifetimeError(
                f"the backward passes since zero_grad() were over {', '.join(map(str, sizes.values()))} examples: "
                f"squares of gradients of unequal micro-batches do not add up. Make them equal (drop_last=True), or "
                f"use engine='fused'"
            )
        if self._declared_size not in (None, found[0]):
            raise LifetimeError(
                f"every backward pass is one micro-batch, and these were over {found[0]} examples, not over "
                f"microbatch_size={self._declared_size}: backpropagate as many at a time, or use engine='fused'"
            )
        return found[0]

    def left(self, name: str) -> Left | None:
        return self._sums[name].left if name in self._sums else None

    def has(self, name: str) -> bool:
        return name in self._sums

    @property
    def batch_size(self) -> int:
        return sum(self._sizes.values())

    def coverage(self) -> str:
        rows = [(name, p, None, "micro-batches", "") for name, p in self.parameters().items()]
        rows += [(name, p, None, "ignored", "named in ignore") for name, p in self._ignored.items()]
        return table(rows)

    def zero(self) -> None:
        self._passes.forget()
        self._sizes.clear()
        self._sums.clear()

    def detach(self) -> None:
        super().detach()
        self._passes.close()

    def __getstate__(self) -> dict[str, Any]:
        raise GradstatsError("a model attached with engine='microbatch' cannot be copied: detach() it first")


def of_examples(need: str, found: Tensor, whole: Tensor, b: int, m: int) -> Tensor:
    """The sum over B = M b examples that micro-batches estimate (see MicrobatchHandle), from theirs and C^2.

    Of squared norms, only the sum over examples is known.
    """
    if b == 1:
        return found
    if m < 2:
        raise GradstatsError(
            f"{need!r} of single examples cannot be told from one micro-batch of {b}: backpropagate two at least "
            f"between zero_grad() and reading (each loss divided by their number), or use engine='fused'"
        )
    if need == SQUARED_NORMS.name:
        found, whole = found.sum(), whole.sum()
    mean = whole / (b * m)
    return mean + (found / b - mean).clamp(min=0) * ((b * m - 1) / (m - 1))
