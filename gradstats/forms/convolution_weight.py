"""Contributions to the weight of a convolution, in whichever way is the fastest for its shape.

    examples  torch's kernel for the weight gradient, once an example
    grouped   the same kernel once for several examples, which become groups of one convolution: small weights
    unfolded  outer sums c_b = sum_t d_bt u_bt^T over positions t, where u (n, t, i k) are the windows of the input that
              the kernel sees: few positions, large weights

An outer sum for every k, of d and the shifted x, needs no windows, and was never the fastest: on the CPU it took 1.1 to
6 times the best of these, on eight shapes with 3 to 512 channels, strides, and kernels of one position.

The transposed convolution has x and d change places. Index letters: k position in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from math import prod
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.choice import fastest
from gradstats.contribution import BLOCK, CACHED, Contribution
from gradstats.forms.dense import Dense
from gradstats.forms.outer import OuterSum
from gradstats.forms.streamed import Streamed
from gradstats.sums import Reduction, wide

aten = torch.ops.aten

# With so many times fewer positions than the weight has rows, no other way was the fastest, with a kernel or without.
SURELY_UNFOLDED = 16


class Settings(NamedTuple):
    """What torch's kernel takes beside tensors, in its order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def input_gradient(self, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution_backward(d, x, weight, None, *self, [True, False, False])[0]

    def weight_gradient(self, d: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return aten.convolution_backward(d, x, weight, None, *self, [False, True, False])[1]


class ConvolutionWeight(Streamed):
    """c_b is the weight gradient of a convolution over example b alone: x (n, i, ...), d (n, o, ...)."""

    def __init__(self, d: Tensor, x: Tensor, weight: Tensor, settings: Settings):
        self.d, self.x, self.weight, self.settings = d, x, weight, settings
        self.count, self.shape, self.dtype, self.device = d.shape[0], tuple(weight.shape), d.dtype, d.device

    @property
    def operands(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        s = self.settings
        return (self.d, self.x, self.weight), (
            *s.stride,
            *s.padding,
            *s.dilation,
            s.transposed,
            *s.output_padding,
            s.groups,
        )

    @classmethod
    def of(cls, tensors, integers):
        k = tensors[0].dim() - 2
        s = list(integers)
        settings = Settings(s[:k], s[k : 2 * k], s[2 * k : 3 * k], bool(s[3 * k]), s[3 * k + 1 : -1], s[-1])
        return cls(*tensors, settings)

    def example(self, n: int) -> Tensor:
        return self.settings.weight_gradient(self.d[n : n + 1], self.x[n : n + 1], self.weight)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        if self.settings.groups > 1:
            return super().tile(rows, columns)
        # The weight's rows are channels of the output, or of the input of a transposed convolution.
        d, x = (self.d, self.x[:, rows]) if self.settings.transposed else (self.d[:, rows], self.x)
        part = ConvolutionWeight(d, x, self.weight[rows], self.settings)
        return torch.stack([part.example(n).flatten(1)[:, columns] for n in range(self.count)])

    def gradient(self) -> Tensor:
        return self.settings.weight_gradient(self.d, self.x, self.weight)

    def subset(self, index: Tensor) -> Contribution:
        return ConvolutionWeight(self.d[index], self.x[index], self.weight, self.settings)

    def direct(self, names: Collection[str]) -> Reduction:
        s, sizes = self.settings, (*self.shape, *self._operands[0].shape[2:])
        key = ("ConvolutionWeight", *sorted(names), self.device.type, self.dtype, *sizes, *s.stride, *s.dilation)
        return fastest((*key, s.groups, self.count.bit_length()), self.ways(names))

    def ways(self, names: Collection[str]) -> dict[str, Callable[[], Reduction]]:
        """Those worth measuring, the likeliest one first."""
        rows, positions = self.shape[0], prod(self._operands[0].shape[2:])
        ways: dict[str, Callable[[], Reduction]] = {}
        if 2 * self.weight.numel() <= CACHED:
            ways["grouped"] = lambda: in_parts(self.grouped(), names, self)
        ways["examples"] = partial(super().direct, names)
        # The windows of an example are positions/rows times as many numbers as the weight has.
        if self.settings.groups == 1 and positions <= rows:
            unfolded = {"unfolded": lambda: in_parts(self.unfolded(), names, self)}
            if SURELY_UNFOLDED * positions <= rows:
                return unfolded
            ways = unfolded | ways if 2 * positions <= rows else ways | unfolded
        return ways

    @property
    def _operands(self) -> tuple[Tensor, Tensor]:
        """What has the channels of the weight's rows, and what the kernel's windows are in."""
        return (self.x, self.d) if self.settings.transposed else (self.d, self.x)

    def grouped(self) -> Iterator[Dense]:
        """Contributions of as many examples at a time as stay in cache."""
        size = max(1, min(self.count, CACHED // max(1, self.weight.numel())))
        for start in range(0, self.count, size):
            d, x = (t[start : start + size] for t in (self.d, self.x))
            n = len(d)
            weight = self.weight.new_empty(()).expand(n * self.shape[0], *self.shape[1:])  # of which the size matters
            settings = self.settings._replace(groups=n * self.settings.groups)
            c = settings.weight_gradient(d.flatten(0, 1).unsqueeze(0), x.flatten(0, 1).unsqueeze(0), weight)
            yield Dense(c.view(n, *self.shape))

    def unfolded(self) -> Iterator[OuterSum]:
        """Contributions of some examples at a time, whose windows are not much more numbers than the weight."""
        rows, source = self._operands
        stride, padding, dilation = self.settings[:3]
        kernel, positions = self.shape[2:], rows.shape[2:]
        width, t = prod(self.shape[1:]), prod(positions)
        size = max(1, min(self.count, max(BLOCK, 2 * self.weight.numel()) // max(1, width * t)))
        room = torch.empty(size, self.shape[1], *kernel, *positions, dtype=self.dtype, device=self.device)
        for start in range(0, self.count, size):
            d, x = (operand[start : start + size] for operand in (rows, source))
            x = F.pad(x, [side for p in reversed(padding) for side in (p, p)]) if any(padding) else x
            n, channel, *steps = x.stride()
            strides = (n, channel, *map(mul, steps, dilation), *map(mul, steps, stride))
            u = room[: len(x)].copy_(x.as_strided((len(x), *room.shape[1:]), strides))
            yield OuterSum(d.flatten(2).mT, u.view(-1, width, t).mT)


def in_parts(parts: Iterator[Contribution], names: Collection[str], whole: Contribution) -> Reduction:
    """The gradient and sums of `whole`, whose examples come in parts."""
    total: dict[str, Tensor] = {}
    norms: list[Tensor] = []
    for part in parts:
        gradient, found = part.like(whole).sums(names)
        if "squared_norms" in found:
            norms.append(found.pop("squared_norms"))
        for name, value in {"gradient": wide(gradient), **found}.items():
            total[name] = total[name].add_(value) if name in total else value
    sums = {name: value.view(whole.shape) for name, value in total.items()}
    gradient = sums.pop("gradient").to(whole.dtype)
    return gradient, sums | ({"squared_norms": torch.cat(norms)} if norms else {})
