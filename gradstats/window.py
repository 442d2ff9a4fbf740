"""How raw sums become numbers: the window that they were gathered in, and the statistic that reads it.

Contributions add up over accumulation steps, so leaves only ever keep raw sums; scale and batch size enter here, once,
on reading.

    g_b = scale c_b          scale = B for a mean loss, 1 for a sum loss; under GradScaler, over the loss's scale;
                             times f where the gradient was clipped; over W where it is an average over W ranks
    m   = scale/B sum c_b    mean gradient
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from gradstats.distributed.local import local, total
from gradstats.errors import GradstatsError
from gradstats.sums import RawSum, wide

# What the windows of many parameters mostly have in common: the fields of one from `batch_size` to `ranks`.
Common = tuple[int, str, float, float, float, float, float]
# A window in parts, sums and gradient and what is in common, which is sooner made and compared than a Window.
Reading = tuple[Mapping[str, Tensor], Tensor | None, Common]


class Window(NamedTuple):
    """What was backpropagated since the gradient was last None.

    `sums` maps keys of raw sums to those of one parameter, to which further passes may add: copy what you keep.
    `gradient` is sum_b c_b, that is p.grad; `batch_size` counts examples, or positions or micro-batches where that
    granularity was asked for.
    `loss_scale` is what a GradScaler multiplied the loss by, and `gradient_scale` what `gradient` still carries of it.
    `factor` is what `gradient` was multiplied by since the backward pass, where that is followed; `sums` were not.
    `fraction`: the part of the examples that `sums` are of, on average.
    `ranks`: over how many of them `gradient` is the average; `sums` add up what each had.
    `elements` are those of the parameter, which statistics ask for and optimizers do not.
    """

    sums: Mapping[str, Tensor]
    gradient: Tensor | None
    batch_size: int
    loss_reduction: str
    loss_scale: float = 1.0
    gradient_scale: float = 1.0
    factor: float = 1.0
    fraction: float = 1.0
    ranks: float = 1
    elements: int = 0

    @property
    def common(self) -> Common:
        return self[2:-1]

    @property
    def scale(self) -> float:
        """g_b / c_b, for c_b as they are in `sums`."""
        size = self.batch_size if self.loss_reduction == "mean" else 1
        return self.factor * size / (self.loss_scale * self.ranks)

    @property
    def mean_scale(self) -> float:
        """m / p.grad."""
        return (1 if self.loss_reduction == "mean" else 1 / self.batch_size) / self.gradient_scale

    @property
    def mean(self) -> Tensor:
        """m (*shape)."""
        if self.gradient is None:
            raise GradstatsError(
                "the mean gradient is needed, but p.grad is None: read this statistic before zero_grad()"
            )
        return wide(self.gradient.to_dense()) * self.mean_scale

    @property
    def squared_mean(self) -> Tensor:
        """|m|^2 (). Of a sharded parameter, all ranks must ask."""
        m = self.mean
        return total(local(m).square().sum(), m)


class Statistic(ABC):
    """One entry of the menu: the raw sums that it needs, and what it reads from them."""

    name: str
    needs_gradient: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> tuple[RawSum, ...]:
        """The raw sums that `read` finds in its window; besides m, if `needs_gradient`."""

    @abstractmethod
    def read(self, window: Window) -> Any:
        """The statistic of one parameter, or of the whole gradient. Raises: GradstatsError where it does not exist."""

    @property
    def has_total(self) -> bool:
        """Whether it is defined for the whole gradient, not only for each parameter."""
        return all(raw.per != "element" for raw in self.needs)

    def total(self, windows: Sequence[Window]) -> Any:
        """Of the whole gradient, from the windows of all parameters: sums over elements add up.

        Raises: GradstatsError if there is none, or if the parameters count different things.
        """
        if not self.has_total:
            raise GradstatsError(f"{self.name!r} has an entry for every element of a parameter, and no total")
        sizes = {window.batch_size for window in windows}
        if len(sizes) > 1:
            raise GradstatsError(
                f"{self.name!r} has no total: the parameters' statistics are over {sorted(sizes)} of what is counted "
                f"as one. Use granularity='example'"
            )
        sums = {}
        for raw in self.needs:
            sums[raw.key] = windows[0].sums[raw.key]
            for window in windows[1:]:
                sums[raw.key] = raw.merge(sums[raw.key], window.sums[raw.key])
        elements = sum(window.elements for window in windows)
        return self.read(windows[0]._replace(sums=sums, gradient=None, elements=elements))


class BlockStatistic(RawSum, Statistic):
    """A statistic with a raw sum of its own: what it takes from a block, and what it reads from the result,
    `window.sums[self.key]`. How to add one:

        class FourthMoment(gradstats.BlockStatistic):
            name, per = "fourth_moment", "element"

            def partial(self, block):
                return block.c.pow(4).sum(0)

            def read(self, window):
                return window.sums[self.key] * window.scale**4 / window.batch_size

        stats = gradstats.attach(model, FourthMoment)
        stats.read("fourth_moment")["fc1.weight"]
    """

    @property
    def needs(self) -> tuple[RawSum, ...]:
        return (self,)
