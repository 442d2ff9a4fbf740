"""Contributions at hand as tensors: of what is small."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from gradstats.contribution import Contribution
from gradstats.sums import Reduction, wide


class Dense(Contribution):
    """All contributions at hand, c (n, *shape): vmap leaves, and what is small."""

    def __init__(self, c: Tensor):
        self.c = c
        self.count, self.shape, self.dtype, self.device = c.shape[0], tuple(c.shape[1:]), c.dtype, c.device

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.c,), ()

    def gradient(self) -> Tensor:
        return self.c.sum(0)

    def example(self, n: int) -> Tensor:
        return self.c[n]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return self.c.reshape(self.count, *self._matrix)[:, rows, columns]

    def direct(self, names: Collection[str]) -> Reduction:
        found = {}
        c2 = wide(self.c).square()  # (n, *shape)
        if "sum_of_squares" in names:
            found["sum_of_squares"] = c2.sum(0)
        if "squared_norms" in names:
            found["squared_norms"] = c2.reshape(self.count, -1).sum(1)
        return self.gradient(), found

    def subset(self, index: Tensor) -> Contribution:
        return Dense(self.c[index])

    def merged(self, size: int) -> Contribution:
        return Dense(self.c.unflatten(0, (-1, size)).sum(1))


class PositionSum(Dense):
    """c_b = sum_t c_bt of contributions (n, positions..., *shape) at hand: biases, normalisation layers. The parameter
    has `dim` dimensions."""

    def __init__(self, c: Tensor, dim: int):
        super().__init__(c if c.dim() == dim + 1 else c.flatten(1, -dim - 1).sum(1))
        self.positions = c

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.positions,), (len(self.shape),)

    def per_token(self) -> Contribution:
        return Dense(self.positions.reshape(-1, *self.shape))
