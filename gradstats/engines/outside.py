"""What engines share that look into no model: they see what whole backward passes add to p.grad, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradstats.coverage import ignored, table
from gradstats.distributed.counts import Counts
from gradstats.distributed.totals import Totals, unshared
from gradstats.engines.passes import Pass, Passes
from gradstats.errors import CoverageError, GradstatsError, LifetimeError, MissingStatistic
from gradstats.forms.dense import Dense
from gradstats.function import no_autocast
from gradstats.gradient import Left, fresh, untouched
from gradstats.handle import Handle, handle_of
from gradstats.reading import ByParameter
from gradstats.statistics import SecondMoment, SimpleNoiseScale, Variance, Wanted
from gradstats.sums import SUM_OF_SQUARES, SUMS, wide
from gradstats.window import Statistic

# Statistics of single examples that sums over several of them estimate without bias.
ESTIMATED = (SecondMoment, Variance, SimpleNoiseScale)


@dataclass
class Sums:
    """Of one parameter, over the backward passes since its gradient was last None."""

    first: int  # the first of these passes
    totals: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # sums with an entry a pass
    left: Left | None = None  # p.grad after the last pass
    unseen: bool = False  # p.grad holds more than the passes added
    zeroed: bool = False  # p.grad was, before the last pass, in which another rank may have added to it
    of_all: Totals | None = None  # over all ranks, up to the pass `told`
    elsewhere: list[float] = field(default_factory=list)  # examples of every pass of other ranks in it
    told: int = 0

    def add(self, index: int, found: dict[str, Tensor]) -> None:
        for key, value in found.items():
            if SUMS[key].per == "example":
                self.steps.setdefault(key, {})[index] = value
            else:
                self.totals[key] = SUMS[key].merge(self.totals[key], value) if key in self.totals else value


class OutsideHandle(Handle):
    """Gathers raw sums over backward passes, each of which adds one gradient to every parameter."""

    engine: ClassVar[str]
    counts_early = False
    call: ClassVar[str]  # what backpropagates
    unseen: ClassVar[str]  # why p.grad may hold more than the passes added

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Wanted],
        loss_reduction: str,
        ignore: Sequence[str] = (),
        granularity: str = "example",
        microbatch_size: int | None = None,
    ):
        super().__init__(model, statistics, loss_reduction, granularity, microbatch_size)
        if granularity == "token":
            raise GradstatsError(f"engine {self.engine!r} has no positions: use engine='fused'")
        for statistic in self.statistics.values():
            self.check(statistic)
        if any(handle_of(p) is not None for p in model.parameters()):
            raise GradstatsError("the model is attached already: use gradstats.attached(model), or detach() it first")
        self._ignored = ignored(model, ignore)
        if not any(p.requires_grad for name, p in model.named_parameters() if name not in self._ignored):
            raise CoverageError(f"{type(model).__name__} has no trainable parameters")
        self._count = 0  # backward passes so far
        self._sizes: dict[int, int] = {}  # examples of each of them in this window
        self._elsewhere = 0  # examples of other ranks in this window
        self._told = 0  # the last pass that other ranks have been told of
        self._sums: dict[str, Sums] = {}
        self._passes = Passes(self, self._ignored)

    # What an engine provides

    @abstractmethod
    def check(self, statistic: Statistic) -> None:
        """Raises: GradstatsError for what the engine cannot tell."""

    @abstractmethod
    def examples(self, ended: Pass) -> int:
        """How many a backward pass was over. Raises: LifetimeError if that cannot be told."""

    @abstractmethod
    def found(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What a backward pass that added these gradients to parameters adds to their sums, both by name."""

    # Backward

    def begin_pass(self) -> None:
        """Before anything is accumulated."""
        if self.exchange is not None:
            for name, own in self._sums.items():
                own.zeroed = self.fresh(name)
                own.unseen |= not (own.zeroed or self.untouched(name))

    def fresh(self, name: str) -> bool:
        """Whether the next gradient is the first since zero_grad(), whichever way it zeroed."""
        return fresh(self.parameters()[name].grad, self.untouched(name))

    def untouched(self, name: str) -> bool:
        """Whether p.grad is as the last backward pass left it."""
        return untouched(self.parameters()[name].grad, self.left(name))

    def begins(self, name: str) -> bool:
        """Whether a gradient that arrives is the first since zero_grad()."""
        looked = self._looked_at(name)
        return self.fresh(name) if looked is None else looked.zeroed

    def changed(self, name: str) -> bool:
        """Whether the gradient that it is added to is not as the last backward pass left it."""
        looked = self._looked_at(name)
        return not self.untouched(name) if looked is None else looked.unseen

    def _looked_at(self, name: str) -> Sums | None:
        """What `begin_pass` has found: since then, others that arrived may have changed the version of this one's."""
        return None if self.exchange is None else self._sums.get(name)

    @property
    def squares_alone(self) -> bool:
        """Whether nothing else is wanted, as almost always."""
        return self.needs == (SUM_OF_SQUARES.name,)

    def of_each(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Raw sums of gradients by name, as if each were the contribution of one example."""
        if self.squares_alone:  # of small tensors the time is that of the calls: one for all
            c = list(map(wide, gradients.values()))
            squares = torch._foreach_mul(c, c)
            return {name: {SUM_OF_SQUARES.name: c2} for name, c2 in zip(gradients, squares, strict=True)}
        return {name: self.of_one(name, gradient) for name, gradient in gradients.items()}

    def of_one(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        """The same of one gradient."""
        contribution = Dense(gradient.unsqueeze(0))
        contribution.parameter = name
        with no_autocast(gradient.device.type):
            return contribution.sums(self.needs)[1]

    def found_in(self, under_way: Pass, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """What a backward pass adds to the sums of these parameters, found once; and of those found before."""
        new = {name: under_way.arrived[name].to_dense() for name in names if name not in under_way.found}
        if new:
            under_way.found.update(self.found(new))
        return under_way.found

    @torch.no_grad()
    def commit(self, ended: Pass) -> None:
        """Adds a backward pass, or forgets all. Raises: LifetimeError if its examples cannot be told."""
        trainable = [name for name, p in self.parameters().items() if p.requires_grad]
        if all(name in ended.began if name in ended.arrived else self.fresh(name) for name in trainable):
            self.zero()
        try:
            examples = self.examples(ended)
        except LifetimeError:
            self.zero()
            raise
        self._count += 1
        self._sizes[self._count] = examples
        for name in ended.arrived:
            if name not in self._sums:
                self._sums[name] = Sums(min(self._sizes))  # earlier passes did not reach it
            elif name in ended.began:
                self._sums[name] = Sums(self._count)  # its gradient was zeroed, and others were not
            self._sums[name].unseen |= name in ended.changed
        try:
            self.add(ended)
        except BaseException:  # some sums may have it, and others not
            self.zero()
            raise
        for name in ended.arrived:
            grad = self.parameters()[name].grad
            self._sums[name].left = None if grad is None else self.note(grad)

    def add(self, ended: Pass) -> None:
        """Adds what a backward pass found to the sums of its parameters."""
        found = self.found_in(ended, ended.arrived)
        for name in ended.arrived:
            self._sums[name].add(self._count, found[name])

    # Reading

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._passes.parameters

    def read(self, statistic: Wanted) -> ByParameter:
        entries = super().read(statistic)
        self.check(entries.statistic)
        return entries

    def over_passes(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], list[float]]:
        """Raw sums of one parameter, and the examples of each backward pass that they are over. Raises:
        MissingStatistic if there are none; LifetimeError if p.grad is not what these passes added."""
        if self._passes.current is not None:
            raise LifetimeError(
                "a backward pass is under way, or was cut short by an exception: read statistics after it, or call "
                "zero_grad() and backpropagate again"
            )
        own = self._sums.get(name)
        if own is None:
            raise MissingStatistic(
                f"parameter '{name}' has no statistics: no backward pass has reached it since they were last zeroed. "
                f"Call {self.call}"
            )
        if own.unseen:
            raise LifetimeError(f"the gradient of '{name}' holds more than these statistics have seen: {self.unseen}")
        if own.of_all is not None and self._count > own.told:
            raise unshared(name, own.of_all.ranks)
        sizes = [size for index, size in self._sizes.items() if index >= own.first]
        found = {need: value for need in needs if (value := self._sum(own, need)) is not None}
        return found, [*sizes, *own.elsewhere]

    def _sum(self, own: Sums, need: str) -> Tensor | None:
        """A raw sum over the window."""
        return self._own(own, need) if own.of_all is None else own.of_all.sums[need]

    def _own(self, own: Sums, need: str) -> Tensor | None:
        """The same of what other ranks have not been told of: of one process, all."""
        if need in own.steps:
            return SUMS[need].accumulate(own.steps[need], dict.fromkeys(self._unsent(own), 1))
        return own.totals.get(need)

    # With other processes

    def _unsent(self, own: Sums | None) -> list[int]:
        """Backward passes that are one parameter's, and that other ranks have not been told of."""
        first = self._told + 1 if own is None else max(own.first, own.told + 1)
        if own is not None and own.zeroed:
            first = self._count
        return [index for index in self._sizes if index >= first]

    def averaged(self, name: str) -> float:
        of_all = self._sums[name].of_all if name in self._sums else None
        return 1 if of_all is None else of_all.ranks

    def unsent(self, name: str, kind: str) -> Tensor | None:
        own, under_way = self._sums.get(name), self._passes.current
        if under_way is None or name not in under_way.arrived:
            return self._own(own, kind) if own is not None and not own.zeroed and self._unsent(own) else None
        new = self.found_in(under_way, [name])[name][kind]
        if own is None or name in under_way.began or kind not in own.totals:
            return new
        return SUMS[kind].merge(own.totals[kind], new)

    def unsent_count(self, name: str) -> int:
        return len(self._unsent(self._sums.get(name)))

    def unsent_examples(self) -> tuple[int, int, bool]:
        new = self._unsent(None)
        return sum(self._sizes[index] for index in new), len(new), True

    def receive(self, ranks: int, counts: Counts, found: dict[tuple[str, str], Tensor]) -> None:
        for name, counted in counts.counted.items():
            p = self.parameters()[name]
            if p.grad is None:
                continue
            if (known := self._sums.get(name)) is None or known.zeroed:
                first = min(self._sizes, default=self._count) if known is None else self._count
                self._sums[name] = Sums(first)
            own = self._sums[name]
            own.totals.clear()
            own.steps.clear()
            own.told = self._count
            own.elsewhere += counts.sizes_elsewhere(counted)
            own.of_all = own.of_all or Totals(ranks)
            own.of_all.add({kind: value for (owner, kind), value in found.items() if owner == name})
            own.left = self.note_average(p, begins=own.left is None)
        self._elsewhere += counts.elsewhere(counts.examples)
        self._told = self._count

    def note_again(self) -> None:
        for name, own in self._sums.items():
            grad = self.parameters()[name].grad
            if grad is not None and own.left is not None and not (own.unseen or own.zeroed):
                own.left = self.note(grad)

    def left(self, name: str) -> Left | None:
        return self._sums[name].left if name in self._sums else None

    def has(self, name: str) -> bool:
        return name in self._sums

    @property
    def batch_size(self) -> int:
        return sum(self._sizes.values()) + self._elsewhere

    def coverage(self) -> str:
        rows = [(name, p, None, self.engine, "") for name, p in self.parameters().items()]
        rows += [(name, p, None, "ignored", "named in ignore") for name, p in self._ignored.items()]
        return table(rows)

    def zero(self) -> None:
        self._elsewhere = 0
        self._sizes.clear()
        self._sums.clear()

    def detach(self) -> None:
        super().detach()
        self._passes.close()

    def __getstate__(self) -> dict[str, Any]:
        raise GradstatsError(f"a model attached with engine={self.engine!r} cannot be copied: detach() it first")
