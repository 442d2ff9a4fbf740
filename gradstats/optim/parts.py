"""Parameters grouped by what their step has in common, so that its scalars are computed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradstats.distributed.local import local, total
from gradstats.distributed.spread import DTensor
from gradstats.errors import GradstatsError
from gradstats.optim.elementwise import Columns, Row
from gradstats.optim.found import Found, State, allocate
from gradstats.optim.update import STATISTICS, Update
from gradstats.sums import accumulation_dtype
from gradstats.window import Window

if TYPE_CHECKING:
    from gradstats.optim.base import ExampleOptimizer

# Examples that averages of statistics cover: an entry of the state, for good, once these have missed any.
COVERED = "statistics_step"
# Torch makes a tensor of a number once for every count that it is added to: given one, it takes half as long.
ONE = torch.tensor(1, device="cpu")


@dataclass(frozen=True)
class Age:
    """What decides the scalars of a parameter's step: B, and the examples that its state has seen, B included."""

    batch_size: int
    examples: int
    younger: tuple[tuple[str, int], ...] = ()  # buffers that have seen fewer
    waiting: int = 0  # of the examples before this batch, those since the averages of statistics last moved
    waits: bool = False  # this batch leaves them as they are

    @property
    def stands_for(self) -> int:
        """Examples in whose place this batch moves the averages of statistics."""
        return self.batch_size + self.waiting

    @property
    def covered(self) -> int:
        """Examples that the averages of statistics have seen."""
        return self.examples - self.stands_for if self.waits else self.examples

    @property
    def of_buffers(self) -> dict[str, int]:
        return dict(self.younger)


@dataclass
class Part:
    """Parameters whose step has everything in common but the elements."""

    group: dict[str, Any]
    age: Age
    update: Update
    scalars: dict[str, Any]
    windows: list[Window] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)  # "parameter", "gradient", raw sums and buffers, in one order
    one: Tensor | None = None  # of the parameters

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all elements from those over the columns', which are this rank's where parameters are sharded."""
        assert self.one is not None
        return total(sums, self.one)

    def grow_older(self) -> None:
        """After the step, every state has seen the batch."""
        b, waiting = self.age.batch_size, self.age.waiting
        if self.update.misses:
            for state in self.states:
                state.setdefault(COVERED, state["step"].clone())
            if not self.update.waits:
                add([state[COVERED] for state in self.states], self.age.stands_for)
        add([state["step"] for state in self.states], b)
        for name in self.update.younger:
            add([state[f"{name}_step"] for state in self.states], self.update.growth(name, b, waiting))


def add(counts: list[Tensor], number: int) -> None:
    """In place."""
    torch._foreach_add_(counts, ONE, alpha=number)


# By what their ages, numbers and units of gradients are.
Parts = dict[tuple[Any, ...], tuple[Part, list[Row]]]


class Plan(NamedTuple):
    """An update, and what it would make anew whenever it is asked: once for all parameters alike."""

    update: Update
    dtype: torch.dtype  # of the buffers
    reads: tuple[str, ...]
    buffers: tuple[str, ...]
    younger: tuple[str, ...]
    numbers: tuple[str, ...]
    waits: bool


def plan_of(update: Update, dtype: torch.dtype) -> Plan:
    """For parameters of the given dtype."""
    names = update.reads, update.buffers, update.younger, update.numbers
    return Plan(update, accumulation_dtype(dtype), *names, update.waits)


def parts_of(optimizer: ExampleOptimizer, found: Sequence[Found], loss_scale: float) -> list[Part]:
    """All that a step moves, which is what was found but for averages that wait for their first batch.

    `loss_scale` is what the loss was multiplied by while windows do not know of it.
    """
    plans: dict[tuple[Any, ...], tuple[Plan, Parts]] = {}
    for index, p, state, window in found:
        group, b = optimizer.param_groups[index], window.batch_size
        choice = (index, b, p.dtype, window.fraction, bool(window.sums), *state)
        known = plans.get(choice)
        if known is None:
            known = plans[choice] = plan_of(update_of(optimizer, group, state, window), p.dtype), {}
        plan, parts = known
        row = row_of(p, state, window, plan)
        before = state["step"].item()
        waiting = before - state[COVERED].item() if COVERED in state else 0
        if plan.waits and waiting == before:  # there is no average yet
            continue
        ages: tuple[tuple[str, int], ...] = ()
        if plan.younger:
            growth = plan.update.growth
            ages = tuple([(name, int(state[f"{name}_step"]) + growth(name, b, waiting)) for name in plan.younger])
        numbers = tuple([float(state[name]) for name in plan.numbers]) if plan.numbers else ()
        units = window.loss_reduction, window.factor, window.loss_scale, window.gradient_scale, window.ranks
        key = (before, waiting, ages, numbers, units, p.device, p.device_mesh if isinstance(p, DTensor) else None)
        of_part = parts.get(key)
        if of_part is None:
            age = Age(b, before + b, ages, waiting, plan.waits)
            scalars = common_scalars(group, age, plan.update, window, loss_scale)
            scalars |= optimizer.scalars(group, age, plan.update)
            of_part = parts[key] = Part(group, age, plan.update, scalars, one=p), []
        part, rows = of_part
        part.windows.append(window)
        part.states.append(state)
        rows.append(row)
    complete: list[Part] = []
    for part, rows in chain.from_iterable(parts.values() for _, parts in plans.values()):
        names = ("parameter", "gradient", *part.update.reads, *part.update.buffers)
        part.columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        complete.append(part)
    return complete


def row_of(p: Tensor, state: State, window: Window, plan: Plan) -> Row:
    """A parameter, its gradient, raw sums and buffers; of a sharded one, what is here."""
    gradient = p.grad
    assert gradient is not None
    row = [p, gradient.to_dense() if gradient.is_sparse else gradient, *[window.sums[name] for name in plan.reads]]
    for name in plan.buffers:
        buffer = state.get(name)
        if buffer is None or buffer.dtype != plan.dtype:
            allocate(p, state, plan.update)
            buffer = state[name]
        row.append(buffer)
    return [local(t) for t in row] if isinstance(p, DTensor) else row


def update_of(optimizer: ExampleOptimizer, group: Mapping[str, Any], state: State, window: Window) -> Update:
    """For a parameter of the group whose state and window these are."""
    update = optimizer.update(group, window.batch_size, state)
    gathered = bool(window.sums)
    if not update.statistics or (gathered and window.fraction == 1):
        return update
    of_part = update.of_part(state, gathered)
    assert of_part is not None  # or `find` has refused
    return of_part


def common_scalars(
    group: Mapping[str, Any], age: Age, update: Update, window: Window, loss_scale: float
) -> dict[str, Any]:
    """Those of every optimizer: m = mean_scale p.grad, statistics of raw sums alike, and weight decay.

    Raises: GradstatsError for a decay that would turn the parameter's sign.
    """
    sign, b = -1.0 if group["maximize"] else 1.0, age.batch_size
    scalars: dict[str, Any] = {"mean_scale": sign * window.mean_scale / loss_scale}
    for name in update.statistics:
        _, power, odd = STATISTICS[name]
        scalars[f"{name}_scale"] = (sign if odd else 1.0) * (window.scale / loss_scale) ** power / b
    decay: Any = 1.0
    if update.coupled:
        scalars["l2"] = group["weight_decay"]
    elif group["weight_decay"] != 0:
        lr, rate = group["lr"], group["weight_decay"]
        known = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if known and lr * rate > 1:
            raise GradstatsError(f"lr = {float(lr)} times weight_decay = {rate} is above 1: no decay factor")
        decay = (1 - lr * rate) ** (b / group["batch_size"])
    return scalars | {"decay": decay}
