"""Parameters grouped by what their step has in common, so that its scalars are computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradstats.distributed.local import local, total
from gradstats.distributed.spread import DTensor
from gradstats.errors import GradstatsError
from gradstats.optim.elementwise import Columns
from gradstats.optim.found import Found, Member, State, allocate
from gradstats.optim.tally import Tally
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
    states: list[State]
    columns: Columns  # "parameter", "gradient", raw sums and buffers, in one order
    one: Tensor  # of the parameters
    tally: Tally  # of the states' "step", and maybe of others'

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
        if len(self.states) == len(self.tally):  # it has no others
            self.tally.add(b)
        else:
            add([state["step"] for state in self.states], b)
        for name in self.update.younger:
            add([state[f"{name}_step"] for state in self.states], self.update.growth(name, b, waiting))


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
            update = update_of(optimizer, group, of_kind[0].state, window)
            complete(update, of_kind)
            tally = optimizer.tallies[next(number)]
            for (before, waiting, younger, _), members in alike(of_kind, ages(update, of_kind, tally, b)):
                if update.waits and waiting == before:  # there is no average yet
                    continue
                age = Age(b, before + b, younger, waiting, update.waits)
                scalars = common_scalars(group, age, update, window, loss_scale)
                scalars |= optimizer.scalars(group, age, update)
                states, columns = [member.state for member in members], columns_of(update, members)
                parts.append(Part(group, age, update, scalars, states, columns, members[0].parameter, tally))
    return parts


def alike(members: list[Member], keys: list[Any]) -> Iterable[tuple[Any, list[Member]]]:
    """Those of one key together."""
    if keys.count(keys[0]) == len(keys):  # mostly, and sooner known than sorted
        return [(keys[0], members)]
    found: dict[Any, list[Member]] = {}
    for member, key in zip(members, keys, strict=True):
        found.setdefault(key, []).append(member)
    return found.items()


def kinds(members: Sequence[Member]) -> list[tuple[Any, ...]]:
    """What decides the update of each, and with which others one kernel can move it."""
    return [(p.dtype, p.device, p.device_mesh if isinstance(p, DTensor) else None, *s) for p, _, s, _ in members]


def complete(update: Update, members: Sequence[Member]) -> None:
    """Allocates what the update keeps of the parameters, and is not there yet."""
    dtype, names = accumulation_dtype(members[0].parameter.dtype), update.buffers
    if any(name not in one.state or one.state[name].dtype != dtype for one in members for name in names):
        for one in members:
            allocate(one.parameter, one.state, update)


def ages(
    update: Update, members: Sequence[Member], tally: Tally, b: int
) -> list[tuple[int, int, tuple[tuple[str, int], ...], tuple[float, ...]]]:
    """What decides the scalars of each: the examples that its state has seen, how many of them its averages of
    statistics still wait for, those of its younger buffers with this batch, and its numbers."""
    found, younger, numbers = [], update.younger, update.numbers
    states = [member.state for member in members]
    missed = COVERED in states[0]
    for state, before in zip(states, tally.of(states), strict=True):
        waiting: int = before - state[COVERED].item() if missed else 0
        grown = [(name, int(state[f"{name}_step"]) + update.growth(name, b, waiting)) for name in younger]
        found.append((before, waiting, tuple(grown), tuple([float(state[name]) for name in numbers])))
    return found


def columns_of(update: Update, members: Sequence[Member]) -> Columns:
    """Parameters, gradients, raw sums and buffers, all in one order; of sharded ones, what is here."""
    parameters, gradients, states, sums = map(list, zip(*members, strict=True))
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
