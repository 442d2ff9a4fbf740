"""What each example contributes to the gradient of one parameter, kept in its cheapest form.

    c_b = dL/dtheta_b        (n, *shape)   contribution of example b, never stored for all b unless it is small
    sum_b c_b                (*shape)      the gradient
    sum_b c_b^2              (*shape)      "sum_of_squares"
    ||c_b||^2                (n,)          "squared_norms"

A layer rule says which form its parameters have; a form knows how to reduce itself to the gradient and to the sums that
were asked for, sharing the work between them. Sums are in float32 or wider whatever the dtype of the layer: squares
overflow float16.

Index letters in every file: n example, t position, i input, o output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

# Gram matrices for norms only pay when T^2 (in + out) < GRAM_ADVANTAGE in out: measured crossover near T = 50 on square
# layers. The usual criterion 2 T^2 < in out counts multiplications and picks the slower path.
GRAM_ADVANTAGE = 10


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which squares are formed and summed: float32, or float64 for float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which it may be squared."""
    return x.to(accumulation_dtype(x.dtype))


class Contribution(ABC):
    """Contributions of all examples of a batch to one parameter's gradient."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """sum_b c_b, shaped like the parameter."""

    @abstractmethod
    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient and the sums called `names` ("sum_of_squares", "squared_norms"), in one pass where that is
        cheaper."""


class Dense(Contribution):
    """All contributions at hand, c (n, *shape): biases, normalisation layers, vmap leaves."""

    def __init__(self, c: Tensor):
        self.c = c

    def gradient(self) -> Tensor:
        return self.c.sum(0)

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        found = {}
        c2 = wide(self.c).square()  # (n, *shape)
        if "sum_of_squares" in names:
            found["sum_of_squares"] = c2.sum(0)
        if "squared_norms" in names:
            found["squared_norms"] = c2.flatten(1).sum(1)
        return self.gradient(), found


class Outer(Contribution):
    """c_b = d_b a_b^T, one position an example: d (n, o) and a (n, i).

    sum_b c_b^2 = (d^2)^T (a^2), a second matmul and no example's gradient; ||c_b||^2 = ||d_b||^2 ||a_b||^2.
    """

    def __init__(self, d: Tensor, a: Tensor):
        self.d, self.a = d, a

    def gradient(self) -> Tensor:
        return self.d.T @ self.a

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        found = {}
        d2, a2 = wide(self.d).square(), wide(self.a).square()  # (n, o), (n, i)
        if "sum_of_squares" in names:
            found["sum_of_squares"] = d2.T @ a2
        if "squared_norms" in names:
            found["squared_norms"] = d2.sum(1) * a2.sum(1)
        return self.gradient(), found


class Streamed(Contribution):
    """Contributions formed one example at a time: gradient and sums in one pass, memory of one example's gradient."""

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def example(self, n: int) -> Tensor:
        """c_n, shaped like the parameter; may be overwritten by the next call."""

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = accumulation_dtype(self.dtype)
        gradient = torch.zeros(self.shape, dtype=dtype, device=self.device)
        squares = torch.zeros_like(gradient) if "sum_of_squares" in names else None
        norms = torch.zeros(self.count, dtype=dtype, device=self.device) if "squared_norms" in names else None
        for n in range(self.count):
            c = wide(self.example(n))
            gradient += c
            if squares is not None:
                squares.addcmul_(c, c)
            if norms is not None:
                torch.dot(c.reshape(-1), c.reshape(-1), out=norms[n])
        found = {"sum_of_squares": squares, "squared_norms": norms}
        return gradient.to(self.dtype), {name: value for name, value in found.items() if value is not None}


class OuterSum(Streamed):
    """c_b = sum_t d_bt a_bt^T, positions summed before squaring: d (n, t, o) and a (n, t, i).

    The stream of per-example gradients replaces the batch matmul, so the sum of squares costs memory traffic but no
    arithmetic to speak of. Norms alone go through Gram matrices, ||c_b||^2 = <d_b d_b^T, a_b a_b^T>, when T is small.
    """

    def __init__(self, d: Tensor, a: Tensor):
        self.d, self.a = d, a
        self.count, self.dtype, self.device = d.shape[0], d.dtype, d.device
        self.shape = (d.shape[2], a.shape[2])
        self._buffer = torch.empty(self.shape, dtype=d.dtype, device=d.device)

    def example(self, n: int) -> Tensor:
        return torch.mm(self.d[n].T, self.a[n], out=self._buffer)

    def gradient(self) -> Tensor:
        return self.d.flatten(0, 1).T @ self.a.flatten(0, 1)

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        positions, (o, i) = self.d.shape[1], self.shape
        if set(names) == {"squared_norms"} and positions**2 * (o + i) < GRAM_ADVANTAGE * o * i:
            d, a = wide(self.d), wide(self.a)
            gram = (d @ d.mT) * (a @ a.mT)  # (n, t, t)
            return self.gradient(), {"squared_norms": gram.sum((1, 2))}
        return super().sums(names)


class Rows(Contribution):
    """c_b has few non-zero rows: d (n, t, o) goes to the rows ids (n, t) of a table (rows, o).

    Repeated ids within an example are summed before squaring.
    """

    def __init__(self, ids: Tensor, d: Tensor, rows: int):
        self.ids, self.d, self.rows = ids, d, rows

    def gradient(self) -> Tensor:
        table = self.d.new_zeros(self.rows, self.d.shape[-1])
        return table.index_add_(0, self.ids.flatten(), self.d.flatten(0, 1))

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        count, width = self.ids.shape[0], self.d.shape[-1]
        d = wide(self.d)
        example = torch.arange(count, device=d.device).unsqueeze(1)
        pairs, index = torch.unique(example * self.rows + self.ids, return_inverse=True)  # (u,) distinct (example, row)
        c = d.new_zeros(pairs.numel(), width).index_add_(0, index.flatten(), d.flatten(0, 1))  # (u, o)
        row, owner = pairs % self.rows, pairs // self.rows
        found = {}
        if "sum_of_squares" in names:
            found["sum_of_squares"] = d.new_zeros(self.rows, width).index_add_(0, row, c.square())
        if "squared_norms" in names:
            found["squared_norms"] = d.new_zeros(count).index_add_(0, owner, c.square().sum(1))
        return d.new_zeros(self.rows, width).index_add_(0, row, c).to(self.d.dtype), found
