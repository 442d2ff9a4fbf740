"""Conv1d, Conv2d, Conv3d with groups, stride, dilation and every padding mode."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradstats.contribution import Contribution, PositionSum, Streamed
from gradstats.rules.registry import Rule, rule

aten = torch.ops.aten


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


def contributions_of(
    d: Tensor, x: Tensor, weight: Tensor, settings: Settings, wanted: frozenset[str]
) -> dict[str, Contribution]:
    """c_b of the weight, and sum_t d_bt of the bias."""
    contributions: dict[str, Contribution] = {}
    if "weight" in wanted:
        contributions["weight"] = ConvolutionWeight(d, x, weight, settings)
    if "bias" in wanted:
        contributions["bias"] = PositionSum(d.movedim(1, -1), 1)
    return contributions


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Convolution(Rule):
    """c_b is the weight gradient of example b alone, and sum_t d_bt for the bias; any number of dimensions.

    Padding that torch's kernel does not know (circular, reflect, replicate, an uneven "same") is applied first.
    """

    autocast = "low"

    @staticmethod
    def unbatched(module: _ConvNd, x):
        return x.dim() != module.weight.dim()

    @staticmethod
    def options(module: _ConvNd):
        zeros = module.padding_mode == "zeros"
        if isinstance(module.padding, str):  # "valid" or "same"
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            total = total if module.padding == "same" else [0] * len(total)
            before, after = [t // 2 for t in total], [t - t // 2 for t in total]
        else:
            before = after = list(module.padding)
        none = [0] * len(before)
        if zeros and before == after:
            pad, padding = None, before
        else:
            pad = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
            padding = none
        mode = "constant" if zeros else module.padding_mode
        settings = Settings(list(module.stride), padding, list(module.dilation), False, none, module.groups)
        return pad, mode, settings

    @staticmethod
    def forward(options, x, parameters):
        pad, mode, settings = options
        weight = parameters["weight"]
        padded = x if pad is None else F.pad(x, pad, mode=mode)
        return torch.convolution(padded, weight, parameters["bias"], *settings), (x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        pad, mode, settings = options
        x, weight = saved
        padded, unpad = x, None
        if pad is not None:
            padded, unpad = torch.func.vjp(lambda x: F.pad(x, pad, mode=mode), x)
        grad_input = None
        if "input" in wanted:
            grad_input = settings.input_gradient(d, padded, weight)
            grad_input = grad_input if unpad is None else unpad(grad_input)[0]
        return grad_input, contributions_of(d, padded, weight, settings, wanted)
