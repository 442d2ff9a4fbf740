"""The parameters of a step, with what was backpropagated through them: how an optimizer finds its statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradstats.errors import GradstatsError, MissingStatistic
from gradstats.handle import Handle, handle_of
from gradstats.optim.update import STATISTICS, Update
from gradstats.sums import accumulation_dtype
from gradstats.window import Window

if TYPE_CHECKING:
    from gradstats.optim.base import ExampleOptimizer

State = dict[str, Any]
Read = Callable[[str, Tensor, Tensor], Window]  # the window of a parameter, given by its name, itself and p.grad


class Found(NamedTuple):
    """A parameter that has a gradient."""

    group: int  # its index
    parameter: Tensor
    state: State
    window: Window


def find(optimizer: ExampleOptimizer, batch_size: int | None) -> list[Found]:
    """All that a step moves; `batch_size` is what it was told. Raises: MissingStatistic, LifetimeError."""
    found: list[Found] = []
    alone: list[tuple[int, Tensor, State]] = []
    zeroed = functools.cache(lambda handle: handle.zeroed())
    sizes: dict[Handle, int] = {}
    handle: Handle | None = None
    for index, group in enumerate(optimizer.param_groups):
        windows = Windows(optimizer, group)
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            state = state_of(optimizer, p, group)
            name = None if handle is None else handle.registered(p)
            if name is None:  # the last one's handle is faster to ask
                handle, name = owner(p)
            if not windows.reads and (handle is None or name is None or handle.replaced(name, gradient)):
                alone.append((index, p, state))
                continue
            if handle is not None and zeroed(handle):
                continue
            window = windows.of(p, gradient, state, handle, name)
            if window is None:
                continue
            if handle is not None and handle.granularity != "example":
                check_size(handle, name, window, sizes.setdefault(handle, window.batch_size))
            found.append(Found(index, p, state, window))
    return found + without_statistics(optimizer, alone, found, batch_size)


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


def check_size(handle: Handle, name: str | None, window: Window, others: int) -> None:
    """Raises: GradstatsError for a parameter through which other numbers were backpropagated than through others."""
    if window.batch_size != others:
        raise GradstatsError(
            f"granularity={handle.granularity!r} counts {window.batch_size} at '{name}' and {others} at "
            f"other parameters, which would step at different rates: granularity='example'"
        )


class Windows:
    """Those of a group's parameters: asked once for all parameters of a handle that have statistics, or have none."""

    def __init__(self, optimizer: ExampleOptimizer, group: dict[str, Any]):
        self.optimizer, self.group = optimizer, group
        self.reads = tuple(STATISTICS[name][0] for name in optimizer.statistics(group))
        self.needs_gradient = optimizer.needs_gradient(group)
        self.known: dict[Handle, Read] = {}

    def of(self, p: Tensor, gradient: Tensor, state: State, handle: Handle | None, name: str | None) -> Window | None:
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
                if self.reads and handle.sampled:
                    check_sampled(self.optimizer, self.group, state, handle)
                read = windows_of(self.optimizer, handle, self.reads, self.needs_gradient)
                if handle.every > 1 and self.reads:
                    read = read_or_wait(read, windows_of(self.optimizer, handle, (), False), handle.skipped)
                self.known[handle] = read
            return read(name, p, gradient)
        except MissingStatistic:
            if float(self.group["lr"]) == 0 or (handle is not None and not bool(gradient.any())):
                return None
            raise


def read_or_wait(read: Read, wait: Read, skipped: Callable[[str], bool]) -> Read:
    """Without statistics where the window of a parameter was not gathered."""
    return lambda name, p, gradient: (wait if skipped(name) else read)(name, p, gradient)


def check_sampled(optimizer: ExampleOptimizer, group: dict[str, Any], state: State, handle: Handle) -> None:
    """Raises: GradstatsError for an optimizer that needs the statistics of every batch and example."""
    if optimizer.update(group, math.inf, state).of_part(state, False) is None:
        raise GradstatsError(
            f"{type(optimizer).__name__} with these options needs the statistics of every batch and example, and the "
            f"model was attached with every={handle.every}, fraction={handle.fraction}: attach(..., every=1, "
            f"fraction=1), or BatchInvariantAdam or RMSprop, but for source='variance', which can do with a part"
        )


def windows_of(optimizer: ExampleOptimizer, handle: Handle, reads: tuple[str, ...], needs_gradient: bool) -> Read:
    """What was backpropagated through parameters of a handle, in the units in which their gradients are now."""
    # GradScaler's step sets both, and the scale not if the gradient was unscaled already.
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    by_hand = found_inf is None and handle.loss_scale is not None
    unscaled = found_inf is not None and scale is None and bool(reads)
    backpropagated = handle.windows(reads, needs_gradient or by_hand)
    if unscaled and handle.loss_scale is None:
        raise GradstatsError(
            "scaler.unscale_(optimizer) unscales the gradients but not their squares: leave it to "
            "scaler.step(optimizer) and clip with max_norm, or name it, attach(..., grad_scaler=scaler)"
        )

    def window(name: str, p: Tensor, gradient: Tensor) -> Window:
        if handle.replaced(name, gradient):
            raise MissingStatistic(
                f"the gradient of '{name}' is another tensor than the one that its statistics are of: backpropagate "
                f"through the attached model before every step"
            )
        found = backpropagated(name, p)
        return handle.without_loss_scale(name, found, unscaled) if by_hand or unscaled else found

    return window


def without_statistics(
    optimizer: ExampleOptimizer, alone: list[tuple[int, Tensor, State]], found: list[Found], given: int | None
) -> list[Found]:
    """Parameters of no attached model: the batch size is that of the others, or the one given to `step`."""
    sizes = {one.window.batch_size for one in found}
    if given is not None and sizes - {given}:
        raise GradstatsError(
            f"step(batch_size={given}), but {sorted(sizes - {given})} examples were backpropagated through the "
            f"attached model: leave batch_size away, statistics know it"
        )
    groups = optimizer.param_groups
    moving = [row for row in alone if sizes or given is not None or float(groups[row[0]]["lr"]) != 0]
    if not moving:
        return []
    if given is None and len(sizes) != 1:
        raise MissingStatistic(
            f"the batch size behind the gradient of a parameter of shape {tuple(moving[0][1].shape)} is not known: "
            f"call gradstats.attach(model) before the forward pass, or step(batch_size=...)"
        )
    b = given if given is not None else next(iter(sizes))
    reductions = {one.window.loss_reduction for one in found} or {"mean"}
    if len(reductions) > 1:
        raise GradstatsError("models attached with different loss_reductions in one step: an optimizer each")
    (reduction,) = reductions
    return [Found(index, p, state, Window({}, p.grad, b, reduction, p.numel())) for index, p, state in moving]


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
    for name in update.tallies:
        if name not in state:
            state[name] = torch.zeros((), dtype=dtype, device=p.device)
