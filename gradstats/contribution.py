"""What each example contributes to the gradient of one parameter, kept in its cheapest form.

    c_b = dL/dtheta_b        (n, *shape)   contribution of example b, never stored for all b unless it is small
    sum_b c_b                (*shape)      the gradient
    sum_b c_b^2              (*shape)      "sum_of_squares"
    ||c_b||^2                (n,)          "squared_norms"

A layer rule says which form its parameters have. A form reduces itself to the gradient and to the two sums above,
sharing the work between them; any other sum sees the contributions of all examples, block by block (blocks.py). Sums
are in float32 or wider whatever the dtype of the layer: squares overflow float16.

Index letters in every file: n example, t position, i input, o output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from gradstats import kernels, native
from gradstats.blocks import BLOCK, CACHED, DIRECT, Contribution, tiles
from gradstats.choice import fastest
from gradstats.products import product
from gradstats.sums import accumulation_dtype, wide

# Gram matrices for norms only pay when T^2 (in + out) < GRAM_ADVANTAGE in out: measured crossover near T = 50 on square
# layers. The usual criterion 2 T^2 < in out counts multiplications and picks the slower path.
GRAM_ADVANTAGE = 10
# From here on a matmul for each example comes close enough to the batch matmul to be measured beside better ways.
MANY_POSITIONS = 32


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

    def direct(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
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


# f with f(d a) = f(d) f(a), whose sum over examples is a matmul of f(d) and f(a).
MULTIPLICATIVE = {"sum_of_squares": torch.square, "abs_mean": torch.abs, "sign_mean": torch.sign}


class Outer(Contribution):
    """c_b = d_b a_b^T, one position an example: d (n, o) and a (n, i).

    sum_b f(c_b) = f(d)^T f(a), a second matmul and no example's gradient; <c_a, c_b> = <d_a, d_b> <a_a, a_b>. A kernel
    in C++ has both matmuls in hardly more time than the first.
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

    def sums(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        d, a = self.d.unsqueeze(1), self.a.unsqueeze(1)
        if "sum_of_squares" not in names or not DIRECT.issuperset(names) or not native.serves(d, a):
            return super().sums(names)
        squares = ["sum_of_squares"]
        key = ("Outer", self.dtype, self.statistics_dtype, *self.shape, self.count.bit_length())
        ways = {"native": partial(native.outer_sum, d, a, squares), "products": partial(super().sums, squares)}
        if self.statistics_dtype is not None:
            ways = dict(reversed(ways.items()))  # the error that was asked for, unless being exact is faster
        gradient, found = fastest(key, ways)
        return gradient, found | self.closed(set(names).difference(squares))

    def closed(self, names: Collection[str]) -> dict[str, Tensor]:
        d, a, dtype = wide(self.d), wide(self.a), self.statistics_dtype
        found = {name: product(f(d).T, f(a), dtype) for name, f in MULTIPLICATIVE.items() if name in names}
        if "squared_norms" in names:
            found["squared_norms"] = d.square().sum(1) * a.square().sum(1)
        if "gram" in names:
            found["gram"] = product(d, d.T, dtype) * product(a, a.T, dtype)
        return found

    def per_token(self) -> Contribution:
        return Outer(self.d, self.a)

    def subset(self, index: Tensor) -> Contribution:
        return Outer(self.d[index], self.a[index])

    def merged(self, size: int) -> Contribution:
        return OuterSum(self.d.unflatten(0, (-1, size)), self.a.unflatten(0, (-1, size)))


class Streamed(Contribution):
    """Contributions formed one example at a time: gradient and sums in one pass, memory of one example's gradient.

    A tile takes its part of every example's contribution, which is formed anew for each tile: a form that can compute a
    part of it alone overrides `tile`.
    """

    def tile(self, rows: slice, columns: slice) -> Tensor:
        parts = (self.example(n).reshape(self._matrix)[rows, columns].clone() for n in range(self.count))
        return torch.stack(list(parts))

    def parts(self) -> Iterator[tuple[slice, Contribution]]:
        """Rows of the parameter, and the contributions to these alone: all at once, where that is not too large."""
        yield slice(None), self

    def direct(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = accumulation_dtype(self.dtype)
        gradient = torch.zeros(self.shape, dtype=dtype, device=self.device)
        squares = torch.zeros_like(gradient) if "sum_of_squares" in names else None
        norms = torch.zeros(self.count, dtype=dtype, device=self.device) if "squared_norms" in names else None
        for rows, part in self.parts():
            for n in range(self.count):
                c = wide(part.example(n))
                gradient[rows] += c
                if squares is not None:
                    squares[rows].addcmul_(c, c)
                if norms is not None:
                    norms[n] += torch.dot(c.reshape(-1), c.reshape(-1))
        found = {"sum_of_squares": squares, "squared_norms": norms}
        return gradient.to(self.dtype), {name: value for name, value in found.items() if value is not None}

    def merged(self, size: int) -> Contribution:
        return Groups(self, size)


class Groups(Streamed):
    """Groups of `size` consecutive examples of another form."""

    def __init__(self, whole: Contribution, size: int):
        self.whole, self.size = whole, size
        self.count, self.shape = whole.count // size, whole.shape
        self.dtype, self.device = whole.dtype, whole.device

    def gradient(self) -> Tensor:
        return self.whole.gradient()

    def subset(self, index: Tensor) -> Contribution:
        members = torch.arange(self.size, device=index.device)
        return Groups(self.whole.subset((index.unsqueeze(1) * self.size + members).flatten()), self.size)

    def example(self, n: int) -> Tensor:
        c = self.whole.example(n * self.size).clone()
        for m in range(n * self.size + 1, (n + 1) * self.size):
            c += self.whole.example(m)
        return c


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

    def direct(self, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        (n, t, _), shape = self.d.shape, self.shape
        key = ("OuterSum", *sorted(names), self.device.type, self.dtype, *shape, n.bit_length(), t.bit_length())
        return fastest(key, self.ways(names))

    def ways(self, names: Collection[str]) -> dict[str, Callable[[], tuple[Tensor, dict[str, Tensor]]]]:
        """Those worth measuring, the likeliest one first."""
        (n, t, o), i = self.d.shape, self.shape[1]
        ways: dict[str, Callable[[], tuple[Tensor, dict[str, Tensor]]]] = {}
        if native.serves(self.d, self.a):
            ways["native"] = partial(native.outer_sum, self.d, self.a, names)
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

    def gram(self) -> tuple[Tensor, dict[str, Tensor]]:
        d, a = wide(self.d), wide(self.a)
        gram = product(d, d.mT, self.statistics_dtype) * product(a, a.mT, self.statistics_dtype)  # (n, t, t)
        return self.gradient(), {"squared_norms": gram.sum((1, 2))}

    def per_token(self) -> Contribution:
        return Outer(self.d.flatten(0, 1), self.a.flatten(0, 1))

    def subset(self, index: Tensor) -> Contribution:
        return OuterSum(self.d[index], self.a[index])

    def merged(self, size: int) -> Contribution:
        d, a = (x.reshape(-1, size * x.shape[1], x.shape[2]) for x in (self.d, self.a))
        return OuterSum(d, a)
