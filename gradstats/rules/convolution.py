"""Conv1d, Conv2d, Conv3d with groups, stride, dilation and every padding mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradstats.contribution import Contribution, Dense, Streamed
from gradstats.rules.registry import Rule, example_sum, rule

aten = torch.ops.aten
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvolutionWeight(Streamed):
    """c_b is the weight gradient of a convolution over example b alone: x (n, i, ...), d (n, o, ...)."""

    def __init__(self, d: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int):
        self.d, self.x, self.weight = d, x, weight
        self.settings = (stride, padding, dilation, False, [0] * len(stride), groups)
        self.count, self.shape, self.dtype, self.device = d.shape[0], tuple(weight.shape), d.dtype, d.device

    def weight_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        return aten.convolution_backward(d, x, self.weight, None, *self.settings, [False, True, False])[1]

    def example(self, n: int) -> Tensor:
        return self.weight_gradient(self.d[n : n + 1], self.x[n : n + 1])

    def gradient(self) -> Tensor:
        return self.weight_gradient(self.d, self.x)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Convolution(Rule):
    """Padding that torch's kernel does not know (circular, reflect, replicate, an uneven "same") is applied first."""

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
        if zeros and before == after:
            pad, padding = None, before
        else:
            pad = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
            padding = [0] * len(before)
        mode = "constant" if zeros else module.padding_mode
        return pad, mode, list(module.stride), padding, list(module.dilation), module.groups

    @staticmethod
    def forward(options, x, parameters):
        pad, mode, *settings = options
        stride, padding, dilation, groups = settings
        weight = parameters["weight"]
        padded = x if pad is None else F.pad(x, pad, mode=mode)
        convolve = CONVOLUTIONS[weight.dim() - 2]
        return convolve(padded, weight, parameters["bias"], stride, padding, dilation, groups), (x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        pad, mode, stride, padding, dilation, groups = options
        x, weight = saved
        padded, unpad = x, None
        if pad is not None:
            padded, unpad = torch.func.vjp(lambda x: F.pad(x, pad, mode=mode), x)
        grad_input = None
        if "input" in wanted:
            settings = (stride, padding, dilation, False, [0] * len(stride), groups)
            grad_input = aten.convolution_backward(d, padded, weight, None, *settings, [True, False, False])[0]
            grad_input = grad_input if unpad is None else unpad(grad_input)[0]
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            contributions["weight"] = ConvolutionWeight(d, padded, weight, stride, padding, dilation, groups)
        if "bias" in wanted:
            contributions["bias"] = Dense(example_sum(d.movedim(1, -1), keep=1))
        return grad_input, contributions
