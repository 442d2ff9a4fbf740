"""Conv1d, Conv2d, Conv3d with groups, stride, dilation and every padding mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradstats.contribution import Contribution
from gradstats.forms.convolution_weight import ConvolutionWeight, Settings
from gradstats.forms.dense import PositionSum
from gradstats.rules.registry import Rule, rule


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
