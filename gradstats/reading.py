"""What is read from a handle: the menu by name, and each statistic by parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradstats.errors import MissingStatistic
from gradstats.statistics import Wanted, statistic_of
from gradstats.window import Statistic, Window


class Readable(ABC):
    """The menu, read from windows that a handle provides."""

    statistics: dict[str, Statistic]  # that are collected, by name

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]: ...

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def window(self, key: str | Tensor, needs: Sequence[str], needs_gradient: bool = False) -> Window: ...

    @abstractmethod
    def without_loss_scale(self, key: str | Tensor, window: Window) -> Window: ...

    def read(self, statistic: Wanted) -> ByParameter:
        """A statistic of every parameter, computed when an entry is read."""
        found = self.statistics.get(statistic) if isinstance(statistic, str) else None
        return ByParameter(self, found or statistic_of(statistic))

    @property
    def second_moment(self) -> ByParameter:
        """q = (1/B) sum_b g_b^2 of every parameter."""
        return self.read("second_moment")

    @property
    def variance(self) -> ByParameter:
        """s2 = B/(B-1) (q - m^2) of every parameter."""
        return self.read("variance")

    @property
    def snr(self) -> ByParameter:
        """|m| / sqrt(s2) of every parameter."""
        return self.read("snr")

    @property
    def norms(self) -> ByParameter:
        """||g_b|| per example (B,), of every parameter and (`.total`) of the whole gradient."""
        return self.read("norms")

    @property
    def noise_scale(self) -> ByParameter:
        """|G|^2, tr Sigma and the simple noise scale, of every parameter and in total."""
        return self.read("noise_scale")

    @property
    def sign_mean(self) -> ByParameter:
        """(1/B) sum_b sign(g_b) of every parameter."""
        return self.read("sign_mean")

    @property
    def abs_mean(self) -> ByParameter:
        """(1/B) sum_b |g_b| of every parameter."""
        return self.read("abs_mean")

    @property
    def max_abs(self) -> ByParameter:
        """max_b |g_b| of every parameter."""
        return self.read("max_abs")

    @property
    def gram(self) -> ByParameter:
        """<g_a, g_b> (B, B), of every parameter and in total."""
        return self.read("gram")

    @property
    def cosine_similarity(self) -> ByParameter:
        """<g_a, g_b> / (||g_a|| ||g_b||) (B, B), of every parameter and in total; needs "gram"."""
        return self.read("cosine_similarity")

    @property
    def histogram(self) -> ByParameter:
        """Counts of |g| over examples and elements, of every parameter and in total."""
        return self.read("histogram")

    @property
    def projection(self) -> ByParameter:
        """Random projections of g_b (B, k), of every parameter and in total."""
        return self.read("projection")


def keys(statistic: Statistic) -> tuple[str, ...]:
    """The raw sums that a statistic needs."""
    return tuple(raw.key for raw in statistic.needs)


class ByParameter(Mapping[str, Any]):
    """One statistic of the trainable parameters, keyed by names or by the Parameters themselves."""

    def __init__(self, handle: Readable, statistic: Statistic):
        self.handle, self.statistic = handle, statistic

    def __getitem__(self, key: str | Tensor) -> Any:
        return self.statistic.read(self._window(key))

    def __iter__(self) -> Iterator[str]:
        return (name for name, p in self.handle.parameters().items() if p.requires_grad)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        served = ((name, p) for name, p in self.handle.parameters().items() if p.requires_grad)
        return any(key is p if isinstance(key, Tensor) else key == name for name, p in served)

    def __repr__(self) -> str:
        return f"{self.statistic.name} of {len(self)} parameters, batch size {self.handle.batch_size}"

    @property
    def has_total(self) -> bool:
        """Whether the statistic is defined for the whole gradient, and all parameters count the same things."""
        return self.statistic.has_total and len({window.batch_size for window in self._windows()}) == 1

    @property
    def total(self) -> Any:
        """The statistic of the whole gradient. A parameter without a gradient contributes nothing to it.

        Raises: GradstatsError for statistics that have an entry for every element; MissingStatistic.
        """
        windows = self._windows()
        if not windows:
            raise MissingStatistic("nothing was backpropagated through the attached model, or its handle is detached")
        return self.statistic.total(windows)

    def _windows(self) -> list[Window]:
        return [self._window(name) for name in self.handle.parameters() if self.handle.has(name)]

    def _window(self, key: str | Tensor) -> Window:
        window = self.handle.window(key, keys(self.statistic), self.statistic.needs_gradient)
        return self.handle.without_loss_scale(key, window)
