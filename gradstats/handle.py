"""What `attach` returns, whatever the engine: statistics by name, read from raw sums that an engine gathers."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gradstats.errors import GradstatsError, LifetimeError, MissingStatistic
from gradstats.statistics import STATISTICS, Statistic, Window

LOSS_REDUCTIONS = ("mean", "sum")

# From a parameter to the handle that keeps its statistics; weak on both sides.
_handles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def handle_of(parameter: Tensor) -> Handle | None:
    """The handle attached to the model that owns `parameter`; how optimizers find the statistics."""
    reference = _handles.get(parameter)
    return None if reference is None else reference()


class Handle(ABC):
    """Statistics of the per-example gradients of one model. Made by `gradstats.attach`; a context manager detaches."""

    def __init__(self, model: nn.Module, statistics: Sequence[str], loss_reduction: str):
        unknown = [name for name in statistics if name not in STATISTICS]
        if unknown:
            raise GradstatsError(f"unknown statistic {unknown[0]!r}; the menu is {sorted(STATISTICS)}")
        if loss_reduction not in LOSS_REDUCTIONS:
            raise GradstatsError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, not {loss_reduction!r}")
        self.model = model
        self.loss_reduction = loss_reduction
        self.needs = tuple(dict.fromkeys(need for name in statistics for need in STATISTICS[name].needs))
        self._names: dict[int, str] = {}  # id of a registered parameter -> its full name

    # What an engine provides

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters that the engine serves, by full name."""

    @abstractmethod
    def sums(self, name: str, needs: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """Raw sums of one parameter since its gradient was last None, and how many examples they are over.

        Raises: MissingStatistic if there are none.
        """

    @abstractmethod
    def untouched(self, name: str) -> bool:
        """Whether p.grad is as the last backward pass left it."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a parameter has statistics."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B: examples backpropagated since the gradients were last None."""

    @abstractmethod
    def coverage(self) -> str:
        """A table: parameter, shape, and what serves it."""

    @abstractmethod
    def new_examples(self) -> None:
        """Declares that the forwards from here on see other examples than those before, although no backward came
        between."""

    @abstractmethod
    def zero(self) -> None:
        """Forgets all statistics."""

    def detach(self) -> None:
        """Leaves the model as it was before `attach`."""
        for parameter in self.parameters().values():
            if handle_of(parameter) is self:
                _handles.pop(parameter)
        self._names.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # Reading

    def register(self, parameter: Tensor, name: str) -> None:
        """Makes `handle_of` find this handle. Raises: GradstatsError if another model's handle has the parameter."""
        other = handle_of(parameter)
        if other is not None and other is not self:
            raise GradstatsError(
                f"parameter '{name}' {tuple(parameter.shape)} belongs to two attached models: their statistics would "
                f"not add up. Attach the module that contains both."
            )
        _handles[parameter] = weakref.ref(self)
        self._names[id(parameter)] = name

    def name_of(self, key: str | Tensor) -> str:
        """The full name of a parameter given by name or by itself. Raises: MissingStatistic."""
        parameters = self.parameters()
        if isinstance(key, str):
            if key not in parameters:
                raise MissingStatistic(
                    f"no parameter '{key}' in the attached model; its parameters are {list(parameters)}"
                )
            return key
        for name, p in parameters.items():
            if p is key:
                return name
        raise MissingStatistic(f"a parameter of shape {tuple(key.shape)} does not belong to the attached model")

    def window(self, key: str | Tensor, needs: Sequence[str], needs_gradient: bool = False) -> Window:
        """What was backpropagated through one parameter since its gradient was last None.

        Raises: MissingStatistic if nothing was, or if the sums were not asked for; LifetimeError if the mean gradient
        is needed and p.grad was changed since the backward pass.
        """
        name = self._names.get(id(key)) or self.name_of(key)
        for need in needs:
            if need not in self.needs:
                entries = [s.name for s in STATISTICS.values() if need in s.needs]
                raise MissingStatistic(f"{entries[0]!r} was not collected: attach(model, {entries[0]!r}, ...)")
        sums, size = self.sums(name, needs)
        gradient = self.parameters()[name].grad if needs_gradient else None
        if gradient is not None and not self.untouched(name):
            raise LifetimeError(
                f"the gradient of '{name}' was changed in place after the backward pass (clipping, unscaling), so it "
                f"no longer fits the squares. Read this statistic before, and clip with the optimizer's max_norm."
            )
        return Window(sums, gradient, size, self.loss_reduction)

    def read(self, statistic: str) -> ByParameter:
        """A statistic of every parameter, computed when an entry is read."""
        return ByParameter(self, STATISTICS[statistic])

    @property
    def second_moment(self) -> ByParameter:
        """q = (1/B) sum_b g_b^2 of every parameter."""
        return self.read("second_moment")

    @property
    def variance(self) -> ByParameter:
        """s2 = B/(B-1) (q - m^2) of every parameter."""
        return self.read("variance")

    @property
    def norms(self) -> NormsByParameter:
        """||g_b|| per example (B,), of every parameter and (`.total`) of the whole gradient."""
        return NormsByParameter(self, STATISTICS["norms"])


class ByParameter(Mapping[str, Tensor]):
    """One statistic of the trainable parameters, keyed by names or by the Parameters themselves."""

    def __init__(self, handle: Handle, statistic: type[Statistic]):
        self.handle, self.statistic = handle, statistic

    def __getitem__(self, key: str | Tensor) -> Tensor:
        return self.statistic.read(self.handle.window(key, self.statistic.needs, self.statistic.needs_gradient))

    def __iter__(self) -> Iterator[str]:
        return (name for name, p in self.handle.parameters().items() if p.requires_grad)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{self.statistic.name} of {len(self)} parameters, batch size {self.handle.batch_size}"


class NormsByParameter(ByParameter):
    """Per-example norms, (B,) each."""

    @property
    def total(self) -> Tensor:
        """||g_b|| of the whole gradient (B,). A parameter without a gradient contributes nothing."""
        return total_norms(self[name] for name in self.handle.parameters() if self.handle.has(name))


def total_norms(norms: Iterable[Tensor]) -> Tensor:
    """Norms of the whole from norms of the parts, (B,) each."""
    return torch.stack([norm.square() for norm in norms]).sum(0).sqrt()


def table(rows: Iterable[tuple[str, nn.Parameter, str]]) -> str:
    """The coverage table from (parameter name, parameter, what serves it)."""
    cells = [("parameter", "shape", "served by")]
    cells += [(name, str(tuple(p.shape)), served if p.requires_grad else "frozen") for name, p, served in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
