"""Parameters grouped by what their step has in common, so that its scalars are computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradstats.distributed.local import local, total
from gradstats.distributed.spread import DTensor
from gradstats.errors import GradstatsError
from gradstats.optim.elementwise import Columns
from gradstats.optim.found import Found, Members, State, allocate
from gradstats.optim.tally import Tally
from gradstats.optim.update import STATISTICS, Update
from gradstats.sums import PLAIN, accumulation_dtype
from gradstats.window import Window

if TYPE_CHECKING:
    from gradstats.optim.base import ExampleOptimizer

# Examples that averages of statistics cover: an entry of the state, for good, once these have missed any.
COVERED = "statistics_step"
# Torch makes a tensor of a number once for every count that it is added to: given one, it takes half as long.
ONE = torch.tensor(1, device="cpu")

dtype_of, device_of = attrgetter("dtype"), attrgetter("device")


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
    states: list[State]
    columns: Columns  # "parameter", "gradient", raw sums and buffers, in one order
    one: Tensor  # of the parameters
    tally: Tally  # of the states' counts, and maybe of others'

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all elements from those over the columns', which are this rank's where parameters are sharded."""
        return total(sums, self.one)

    def grow_older(self) -> None:
        """After the step, every state has seen the batch."""
        b, waiting = self.age.batch_size, self.age.waiting
        if self.update.misses:
            for state in self.states:
                state.setdefault(COVERED, state["step"].clone())
            if not self.update.waits:
                add([state[COVERED] for state in self.states], self.age.stands_for)
        numbers = [b, *(self.update.growth(name, b, waiting) for name in self.update.younger)]
        if len(self.states) * len(numbers) == len(self.tally):  # it has no others
            self.tally.add(*numbers)
        else:
            for name, number in zip(counts_of(self.update), numbers, strict=True):
                add([state[name] for state in self.states], number)


def counts_of(update: Update) -> list[str]:
    """The entries of a state that count examples: what it has seen, and what its younger buffers have."""
    return ["step", *(f"{name}_step" for name in update.younger)]


def add(counts: list[Tensor], number: int) -> None:
    """In place."""
    torch._foreach_add_(counts, ONE, alpha=number)


def parts_of(optimizer: ExampleOptimizer, found: Sequence[Found], loss_scale: float) -> list[Part]:
    """All that a step moves, which is what was found but for averages that wait for their first batch.

    `loss_scale` is what the loss was multiplied by while windows do not know of it.
    """
    parts: list[Part] = []
    number = count()  # of a kind: mostly that of the last step, so that states find their tally again
    for index, window, of_window in found:
        group, b = optimizer.param_groups[index], window.batch_size
        for _, of_kind in alike(of_window, kinds(of_window)):
            update = update_of(optimizer, group, of_kind.states[0], window)
            complete(update, of_kind)
            tally = optimizer.tallies[next(number)]
            for (before, waiting, seen, _), members in alike(of_kind, ages(update, of_kind, tally)):
                if update.waits and waiting == before:  # there is no average yet
                    continue
                younger = zip(update.younger, seen, strict=True)
                grown = tuple((name, count + update.growth(name, b, waiting)) for name, count in younger)
                age = Age(b, before + b, grown, waiting, update.waits)
                scalars = common_scalars(group, age, update, window, loss_scale)
                scalars |= optimizer.scalars(group, age, update)
                columns, one = columns_of(update, members), members.parameters[0]
                parts.append(Part(group, age, update, scalars, members.states, columns, one, tally))
    return parts


def alike(members: Members, keys: list[Any]) -> Iterable[tuple[Any, Members]]:
    """Those of one key together."""
    if keys.count(keys[0]) == len(keys):  # mostly, and sooner known than sorted
        return [(keys[0], members)]
    found: dict[Any, list[Any]] = {}
    for row, key in zip(zip(*members, strict=True), keys, strict=True):
        found.setdefault(key, []).append(row)
    return [(key, Members.of(rows)) for key, rows in found.items()]


def kinds(members: Members) -> list[tuple[Any, ...]]:
    """What decides the update of each, and with which others one kernel can move it."""
    parameters = members.parameters
    kept = map(dtype_of, parameters), map(device_of, parameters), map(tuple, members.states)
    if PLAIN.issuperset(map(type, parameters)):
        return list(zip(*kept, strict=True))
    meshes = [p.device_mesh if isinstance(p, DTensor) else None for p in parameters]
    return list(zip(*kept, meshes, strict=True))


def complete(update: Update, members: Members) -> None:
    """Allocates what the update keeps of parameters of a kind, and is not there yet."""
    states, names, dtype = members.states, update.buffers, accumulation_dtype(members.parameters[0].dtype)
    if not (states[0].keys() >= {*names} and {state[name].dtype for name in names for state in states} <= {dtype}):
        for p, state in zip(members.parameters, states, strict=True):
            allocate(p, state, update)


def ages(update: Update, members: Members, tally: Tally) -> list[tuple[int, int, tuple[int, ...], tuple[float, ...]]]:
    """What decides the scalars of each: the examples that its state has seen, how many of them its averages of
    statistics still wait for, those that its younger buffers have seen, and its numbers."""
    states = members.states
    counts, *younger = tally.of(states, *counts_of(update))
    numbers = [[float(state[name]) for state in states] for name in update.numbers]
    waiting = [0] * len(states)
    if COVERED in states[0]:
        waiting = [before - state[COVERED].item() for before, state in zip(counts, states, strict=True)]
    seen, known = (list(zip(*columns, strict=True)) or [()] * len(states) for columns in (younger, numbers))
    return list(zip(counts, waiting, seen, known, strict=True))


def columns_of(update: Update, members: Members) -> Columns:
    """Parameters, gradients, raw sums and buffers, all in one order; of sharded ones, what is here."""
    parameters, gradients, states, sums = members
    columns: Columns = {"parameter": parameters, "gradient": [g.to_dense() if g.is_sparse else g for g in gradients]}
    for name in update.reads:
        columns[name] = [one[name] for one in sums]
    for name in update.buffers:
        columns[name] = [state[name] for state in states]
    if isinstance(parameters[0], DTensor):
        return {name: list(map(local, column)) for name, column in columns.items()}
    return columns


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
