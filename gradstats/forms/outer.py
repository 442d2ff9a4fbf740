"""Contributions to the weight of a Linear layer, of examples with one position or with several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from gradstats import kernels
from gradstats.choice import fastest
from gradstats.contribution import BLOCK, CACHED, Contribution, tiles
from gradstats.forms.streamed import Streamed
from gradstats.matmul import matched, product, rounds
from gradstats.native import outer_sum
from gradstats.sums import OF_SQUARES, Reduction, wide

# Gram matrices for norms only pay when T^2 (in + out) < GRAM_ADVANTAGE in out: measured crossover near T = 50 on square
# layers. The usual criterion 2 T^2 < in out counts multiplications and picks the slower path.
GRAM_ADVANTAGE = 10
# With so few numbers in all contributions, calls are dearer than passes over them: the two matmuls take half as long as
# the kernel that has them in one.
FEW = 2**20
# From here on a matmul for each example comes close enough to the batch matmul to be measured beside better ways.
MANY_POSITIONS = 32

# f with f(d a) = f(d) f(a), whose sum over examples is a matmul of f(d) and f(a).
MULTIPLICATIVE = {"sum_of_squares": torch.square, "abs_mean": torch.abs, "sign_mean": torch.sign}
# Of positive terms: where they cancel, rounding them would be an error without bound.
POSITIVE = frozenset({"sum_of_squares", "abs_mean"})


class Outer(Contribution):
    """c_b = d_b a_b^T, one position an example: d (n, o) and a (n, i).

    sum_b f(c_b) = f(d)^T f(a), a second matmul and no example's gradient; <c_a, c_b> = <d_a, d_b> <a_a, a_b>. A kernel
    in C++ has both matmuls in about the time that torch takes for the first, and no square in memory.
    """

    def __init__(self, d: Tensor, a: Tensor):
        self.d, self.a = d, a
        self.count, self.shape, self.dtype, self.device = d.shape[0], (d.shape[1], a.shape[1]), d.dtype, d.device

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.d, self.a), ()

    def gradient(self) -> Tensor:
        return self.d.T @ self.a

    def example(self, n: int) -> Tensor:
        return torch.outer(self.d[n], self.a[n])

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return wide(self.d[:, rows]).unsqueeze(2) * wide(self.a[:, columns]).unsqueeze(1)

    def sums(self, names: Collection[str]) -> Reduction:
        few = self.count * self.shape[0] * self.shape[1] <= FEW
        if few or "sum_of_squares" not in names or not OF_SQUARES.issuperset(names):
            return super().sums(names)
        d, a, squares = self.d.unsqueeze(1), self.a.unsqueeze(1), ["sum_of_squares"]
        if not outer_sum.serves(d, a):
            return super().sums(names)
        ways = {"native": partial(outer_sum.sums, d, a, squares)}
        if rounds(self.device, self.statistics_dtype):  # the error that was asked for, unless being exact is faster
            ways = {"products": partial(super().sums, squares)} | ways
        key = ("Outer", self.dtype, self.statistics_dtype, *self.shape, self.count.bit_length())
        gradient, found = fastest(key, ways)
        return gradient, found | self.closed(set(names).difference(squares))

    def closed(self, names: Collection[str]) -> dict[str, Tensor]:
        d, a, found = wide(self.d), wide(self.a), {}
        for name, f in MULTIPLICATIVE.items():
            if name in names:
                dtype = self.statistics_dtype if name in POSITIVE else None
                left, right = matched(d, a) if rounds(self.device, dtype) else (d, a)
                found[name] = product(f(left).T, f(right), dtype)
        if "squared_norms" in names:
            found["squared_norms"] = d.square().sum(1) * a.square().sum(1)
        if "gram" in names:
            found["gram"] = product(d, d.T) * product(a, a.T)
        return found

    def per_token(self) -> Contribution:
        return Outer(self.d, self.a)

    def subset(self, index: Tensor) -> Contribution:
        return Outer(self.d[index], self.a[index])

    def merged(self, size: int) -> Contribution:
        return OuterSum(self.d.unflatten(0, (-1, size)), self.a.unflatten(0, (-1, size)))


class OuterSum(Streamed):
    """c_b = sum_t d_bt a_bt^T, positions summed before squaring: d (n, t, o) and a (n, t, i).

    The gradient is the sum of what is formed for the squares, and the batch matmul is not computed:

        native  by a kernel in C++, which keeps c_b in registers: about the time of the batch matmul
        triton  the same on a GPU
        blocks  by elements, of all examples: small parameters
        stream  by examples, one after the other: where they have many positions, memory is no burden
        gram    norms alone, ||c_b||^2 = <d_b d_b^T, a_b a_b^T>, beside the batch matmul: few positions
    """

    def __init__(self, d: Tensor, a: Tensor):
        self.d, self.a = d, a
        self.count, self.dtype, self.device = d.shape[0], d.dtype, d.device
        self.shape = (d.shape[2], a.shape[2])

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return (self.d, self.a), ()

    def example(self, n: int) -> Tensor:
        return torch.mm(self.d[n].T, self.a[n], out=self._buffer)

    def parts(self) -> Iterator[tuple[slice, Contribution]]:
        for rows, _ in tiles(self.shape[0], 1, max(1, BLOCK // self.shape[1])):
            yield rows, OuterSum(self.d[:, :, rows], self.a)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return self.d[:, :, rows].mT @ self.a[:, :, columns]

    def gradient(self) -> Tensor:
        return self.d.flatten(0, 1).T @ self.a.flatten(0, 1)

    def direct(self, names: Collection[str]) -> Reduction:
        (n, t, _), shape = self.d.shape, self.shape
        key = ("OuterSum", *sorted(names), self.device.type, self.dtype, *shape, n.bit_length(), t.bit_length())
        return fastest(key, self.ways(names))

    def ways(self, names: Collection[str]) -> dict[str, Callable[[], Reduction]]:
        """Those worth measuring, the likeliest one first."""
        (n, t, o), i = self.d.shape, self.shape[1]
        ways: dict[str, Callable[[], Reduction]] = {}
        if outer_sum.serves(self.d, self.a):
            ways["native"] = partial(outer_sum.sums, self.d, self.a, names)
        if kernels.available(self.d, self.a):
            from gradstats.kernels import linear  # imports Triton

            ways |= linear.ways(self.d, self.a, names)
        if "sum_of_squares" not in names and t**2 * (o + i) < GRAM_ADVANTAGE * o * i:
            ways["gram"] = self.gram
        if not ways and n * o * i <= CACHED:
            ways["blocks"] = partial(self.from_blocks, names)
        elif not ways or t >= MANY_POSITIONS:
            ways["stream"] = partial(super().direct, names)
        return ways

    def gram(self) -> Reduction:
        d, a = wide(self.d), wide(self.a)
        gram = (d @ d.mT) * (a @ a.mT)  # (n, t, t)
        return self.gradient(), {"squared_norms": gram.sum((1, 2)).clamp_(min=0)}  # where positions cancel

    def per_token(self) -> Contribution:
        return Outer(self.d.flatten(0, 1), self.a.flatten(0, 1))

    def subset(self, index: Tensor) -> Contribution:
        return OuterSum(self.d[index], self.a[index])

    def merged(self, size: int) -> Contribution:
        d, a = (x.reshape(-1, size * x.shape[1], x.shape[2]) for x in (self.d, self.a))
        return OuterSum(d, a)
