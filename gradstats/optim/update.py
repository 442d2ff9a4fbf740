"""An optimizer's equation: written once, for tensors of any one shape, as a pure function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gradstats.sums import accumulation_dtype

Phase = Literal["both", "averages", "move"]

# The statistics that an Update can read, with the raw sum behind each, the power of a contribution in it, and whether
# it changes sign with the loss.
STATISTICS: dict[str, tuple[str, int, bool]] = {
    "second_moment": ("sum_of_squares", 2, False),
    "sign_mean": ("sign_mean", 0, True),
}


class Values:
    """Tensors, or scalars, by name: x.m, k.lr."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def __or__(self, more: Mapping[str, Any]) -> Values:
        return Values(vars(self) | dict(more))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the update has no {name!r}; it has {sorted(vars(self))}")


def moved(average: Tensor, value: Tensor, weight: Any) -> Tensor:
    """(1 - w) x~ + w x."""
    if isinstance(weight, Tensor):  # when compiled, where the branch within lerp would be paid for element by element
        return average + weight * (value - average)
    return torch.lerp(average, value, weight)


def scaled(value: Tensor, factor: Any) -> Tensor:
    """k x, for which a number 1 has nothing to do."""
    return value if not isinstance(factor, Tensor) and factor == 1 else value * factor


class Update(ABC):
    """The choices that change an optimizer's equation, and the equation. A frozen dataclass, so that it is compiled
    once; its numbers come with every step.

    The tensors x, in float32 or wider: x.p the parameter, x.m the mean gradient, the `statistics` and the `buffers` by
    name, and in phase "both" x.before, all of these before this batch. The scalars k are those that the optimizer
    gives, floats or tensors (), besides k.decay, by which decoupled weight decay multiplies the parameter.
    """

    statistics: tuple[str, ...] = ()
    coupled: bool = False  # weight decay as a part k.l2 p of every example's gradient

    @property
    @abstractmethod
    def buffers(self) -> tuple[str, ...]:
        """The names of the state that it keeps, shaped like the parameter, zero at first."""

    @property
    def younger(self) -> tuple[str, ...]:
        """Those of them that have an age of their own, state["<name>_step"]."""
        return ()

    def growth(self, name: str, batch_size: int, waiting: int) -> int:
        """By how many examples a step makes one of these older; `waiting` others came without statistics before."""
        return batch_size

    @property
    def waits(self) -> bool:
        """Whether it is of a batch without statistics, which leaves their averages as they are."""
        return False

    @property
    def misses(self) -> bool:
        """Whether averages of statistics may lack what had a gradient, in this batch or in any before."""
        return False

    def of_part(self, state: Mapping[str, Any], gathered: bool) -> Update | None:
        """The same where statistics are of a part of what is seen (attach(..., every=k, fraction=f)), for a parameter
        whose state has these entries and a batch that has statistics or has none; None if there is no such equation."""
        return None

    @property
    def numbers(self) -> tuple[str, ...]:
        """State that is one number, zero at first, and decides scalars: parameters that differ in it step apart."""
        return ()

    @property
    def device_numbers(self) -> tuple[str, ...]:
        """State that is one number, zero at first, on the parameter's device; the optimizer's `prepare` moves it."""
        return ()

    @property
    def bounded(self) -> str | None:
        """The buffer whose norm max_norm bounds; None for the mean gradient itself."""
        return None

    @abstractmethod
    def averages(self, x: Values, k: Values) -> dict[str, Tensor]:
        """The new values of the buffers."""

    @abstractmethod
    def change(self, x: Values, k: Values) -> Tensor:
        """What is subtracted from the parameter, given the new buffers."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The raw sums behind its statistics."""
        return tuple(STATISTICS[name][0] for name in self.statistics)

    def writes(self, phase: Phase) -> tuple[str, ...]:
        return {
            "both": ("parameter", *self.buffers),
            "averages": self.buffers,
            "move": ("parameter",),
        }[phase]

    def __call__(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], phase: Phase) -> dict[str, Tensor]:
        """New values of what `phase` writes, from the parameter, its gradient, raw sums and buffers."""
        k, p = Values(scalars), tensors["parameter"]
        p = p.to(accumulation_dtype(p.dtype))
        m = scaled(tensors["gradient"].to(p.dtype), k.mean_scale)
        if phase == "move" and self.bounded is None:
            m = m * k.clip
        read = {name: tensors[STATISTICS[name][0]] * scalars[f"{name}_scale"] for name in self.statistics}
        if self.coupled:
            pull = k.l2 * p
            if "second_moment" in read:  # the mean of (g_b + l2 p)^2
                read["second_moment"] = read["second_moment"] + pull * (2 * m + pull)
            m = m + pull
        x = Values({name: tensors[name] for name in self.buffers} | read | {"p": p, "m": m})
        new: dict[str, Tensor] = {}
        if phase != "move":
            new = self.averages(x, k)
            x |= new | {"before": x}
        if phase != "averages":
            change = self.change(x, k)
            if phase == "move" and self.bounded is not None:  # not the buffer, which may be in the denominator too
                change = change * k.clip
            new["parameter"] = scaled(p, k.decay) - change
        return new
