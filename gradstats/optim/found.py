"""The parameters of a step, with what was backpropagated through them: how an optimizer finds its statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import Handle, Reader, handle_of
from gradstats.optim.update import STATISTICS, Update
from gradstats.sums import accumulation_dtype
from gradstats.window import Reading, Window

if TYPE_CHECKING:
    from gradstats.optim.base import ExampleOptimizer

State = dict[str, Any]


# Of a parameter that has a gradient: itself, gradient, state, and raw sums of what was backpropagated through it.
Row = tuple[Tensor, Tensor, State, Mapping[str, Tensor]]


class Members(NamedTuple):
    """Such rows, column by column: what is asked of all tensors is asked at once."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[State]
    sums: list[Mapping[str, Tensor]]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Members:
        return cls(*map(list, zip(*rows, strict=True)))


class Found(NamedTuple):
    """Parameters of a group whose windows differ in their sums and gradients only."""

    group: int  # its index
    window: Window  # of the first of them
    members: Members


def find(optimizer: ExampleOptimizer, batch_size: int | None) -> list[Found]:
    """All that a step moves; `batch_size` is what it was told. Raises: MissingStatistic, LifetimeError."""
    found: list[tuple[int, Window, list[Row]]] = []
    alone: list[tuple[int, Row]] = []  # with the index of their group
    zeroed = functools.cache(lambda handle: handle.zeroed())
    sizes: dict[Handle, int] = {}
    handle: Handle | None = None
    states = optimizer.state
    for index, group in enumerate(optimizer.param_groups):
        readers = Readers(optimizer, group)
        alike: dict[tuple[Any, ...], list[Row]] = {}
        last: tuple[Any, ...] | None = None
        rows: list[Row] = []
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            state = states[p] or state_of(optimizer, p, group)
            name = None if handle is None else handle.registered(p)
            if name is None:  # the last one's handle is faster to ask
                handle, name = owner(p)
            if not readers.needs and (handle is None or name is None or handle.replaced(name, gradient)):
                alone.append((index, (p, gradient, state, {})))
                continue
            if handle is not None and zeroed(handle):
                continue
            reading = readers.read(p, gradient, state, handle, name)
            if reading is None:
                continue
            sums, mean, common = reading
            if handle is not None and handle.granularity != "example":
                size = common[0]
                check_size(handle, name, size, sizes.setdefault(handle, size))
            key = bool(sums), common  # without sums, the window was not gathered
            if key != last:  # mostly the same, and sooner known than looked up
                last, rows = key, alike.setdefault(key, [])
                if not rows:
                    found.append((index, Window(sums, mean, *common), rows))
            rows.append((p, gradient, state, sums))
    found += without_statistics(optimizer, alone, [window for _, window, _ in found], batch_size)
    return [Found(index, window, Members.of(rows)) for index, window, rows in found]


def state_of(optimizer: ExampleOptimizer, p: Tensor, group: dict[str, Any]) -> State:
    """The state of a parameter, with what every batch needs."""
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.tensor(0)  # on the CPU, since it decides scalars of the step
        allocate(p, state, optimizer.update(group, math.inf, state))
    return state


def owner(p: Tensor) -> tuple[Handle | None, str | None]:
    """The handle of a parameter, and its name there if that is known."""
    handle = handle_of(p)
    return handle, None if handle is None else handle.registered(p)


def check_size(handle: Handle, name: str | None, size: int, others: int) -> None:
    """Raises: GradstatsError for a parameter through which other numbers were backpropagated than through others."""
    if size != others:
        raise GradstatsError(
            f"granularity={handle.granularity!r} counts {size} at '{name}' and {others} at "
            f"other parameters, which would step at different rates: granularity='example'"
        )


class Readers:
    """What reads the windows of a group's parameters: one reader for all that a handle has."""

    def __init__(self, optimizer: ExampleOptimizer, group: dict[str, Any]):
        self.optimizer, self.group = optimizer, group
        self.needs = tuple(STATISTICS[name][0] for name in optimizer.statistics(group))
        self.needs_gradient = optimizer.needs_gradient(group)
        self.known: dict[Handle, Reader] = {}

    def read(
        self, p: Tensor, gradient: Tensor, state: State, handle: Handle | None, name: str | None
    ) -> Reading | None:
        """None where there is none and none is needed: for distributed checkpointing's empty step, or an unused layer
        whose gradient was zeroed in place. Raises: MissingStatistic, LifetimeError."""
        try:
            if handle is None:
                raise MissingStatistic(
                    f"no statistics for a parameter of shape {tuple(p.shape)}: call gradstats.attach(model) before "
                    f"the forward pass, and give parameters that are named in ignore to another optimizer"
                )
            name = name or handle.name_of(p)
            read = self.known.get(handle)
            if read is None:
                if self.needs and handle.sampled:
                    check_sampled(self.optimizer, self.group, state, handle)
                read = reader_of(self.optimizer, handle, self.needs, self.needs_gradient)
                if handle.every > 1 and self.needs:
                    read = where_gathered(read, reader_of(self.optimizer, handle, (), False), handle.skipped)
                self.known[handle] = read
            return read(name, p, gradient)
        except MissingStatistic:
            if float(self.group["lr"]) == 0 or (handle is not None and not bool(gradient.any())):
                return None
            raise


def where_gathered(full: Reader, plain: Reader, skipped: Callable[[str], bool]) -> Reader:
    """Without statistics for a parameter whose window was not gathered."""
    return lambda name, p, gradient: (plain if skipped(name) else full)(name, p, gradient)


def check_sampled(optimizer: ExampleOptimizer, group: dict[str, Any], state: State, handle: Handle) -> None:
    """Raises: GradstatsError for an optimizer that needs the statistics of every batch and example."""
    if optimizer.update(group, math.inf, state).of_part(state, False) is None:
        raise GradstatsError(
            f"{type(optimizer).__name__} with these options needs the statistics of every batch and example, and the "
            f"model was attached with every={handle.every}, fraction={handle.fraction}: attach(..., every=1, "
            f"fraction=1), or BatchInvariantAdam or RMSprop, but for source='variance', which can do with a part"
        )


def reader_of(optimizer: ExampleOptimizer, handle: Handle, needs: tuple[str, ...], needs_gradient: bool) -> Reader:
    """Of what was backpropagated through parameters of a handle, in the units in which their gradients are now."""
    # GradScaler's step sets both, and the scale not if the gradient was unscaled already.
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    by_hand = found_inf is None and handle.loss_scale is not None
    unscaled = found_inf is not None and scale is None and bool(needs)
    read = handle.reader(needs, needs_gradient or by_hand)
    if unscaled and handle.loss_scale is None:
        raise GradstatsError(
            "scaler.unscale_(optimizer) unscales the gradients but not their squares: leave it to "
            "scaler.step(optimizer) and clip with max_norm, or name it, attach(..., grad_scaler=scaler)"
        )
    if not (by_hand or unscaled):
        return read

    def without_loss_scale(name: str, p: Tensor, gradient: Tensor | None) -> Reading:
        sums, mean, common = read(name, p, gradient)
        return sums, mean, handle.without_loss_scale(name, Window(sums, mean, *common), unscaled).common

    return without_loss_scale


def without_statistics(
    optimizer: ExampleOptimizer, alone: list[tuple[int, Row]], windows: list[Window], given: int | None
) -> list[tuple[int, Window, list[Row]]]:
    """Parameters of no attached model: the batch size is that of the others, or the one given to `step`."""
    sizes = {window.batch_size for window in windows}
    if given is not None and sizes - {given}:
        raise GradstatsError(
            f"step(batch_size={given}), but {sorted(sizes - {given})} examples were backpropagated through the "
            f"attached model: leave batch_size away, statistics know it"
        )
    groups = optimizer.param_groups
    moving = [(i, row) for i, row in alone if sizes or given is not None or float(groups[i]["lr"]) != 0]
    if not moving:
        return []
    if given is None and len(sizes) != 1:
        raise MissingStatistic(
            f"the batch size behind the gradient of a parameter of shape {tuple(moving[0][1][0].shape)} is not "
            f"known: call gradstats.attach(model) before the forward pass, or step(batch_size=...)"
        )
    b = given if given is not None else next(iter(sizes))
    reductions = {window.loss_reduction for window in windows} or {"mean"}
    if len(reductions) > 1:
        raise GradstatsError("models attached with different loss_reductions in one step: an optimizer each")
    (reduction,) = reductions
    by_group: dict[int, list[Row]] = {}
    for index, row in moving:
        by_group.setdefault(index, []).append(row)
    return [(i, Window({}, rows[0][1], b, reduction), rows) for i, rows in by_group.items()]


def allocate(p: Tensor, state: State, update: Update) -> None:
    """What the update keeps of a parameter, and is not there yet. Raises: GradstatsError if it ought to be."""
    dtype = accumulation_dtype(p.dtype)
    for name in update.buffers:
        if name not in state:
            if int(state["step"]) > 0 and name not in update.younger:
                raise GradstatsError(
                    f"the state of a parameter of shape {tuple(p.shape)} has no {name!r} after {int(state['step'])} "
                    f"examples: it is another optimizer's, or one of its options changed what it keeps. Start with a "
                    f"new optimizer"
                )
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        elif state[name].dtype != dtype:  # the model was converted
            state[name] = state[name].to(dtype)
    for name in update.younger:
        state.setdefault(f"{name}_step", torch.tensor(0))
    for name in update.numbers:
        state.setdefault(name, torch.tensor(0.0, dtype=torch.float64))
    for name in update.device_numbers:
        if name not in state:
            state[name] = torch.zeros((), dtype=dtype, device=p.device)
