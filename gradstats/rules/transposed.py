"""ConvTranspose1d, ConvTranspose2d, ConvTranspose3d with groups, stride, dilation, padding and output padding."""

from __future__ import annotations

import torch
from torch import nn

from gradstats.forms.convolution_weight import Settings
from gradstats.rules.convolution import contributions_of
from gradstats.rules.registry import Rule, rule


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolution(Rule):
    """Contributions as those of a convolution.

    Every call has its own output padding, since `output_size` may set it.
    """

    inputs = ("input", "output_padding")
    autocast = "low"

    @staticmethod
    def bind(module, input, output_size=None):
        spatial = module.weight.dim() - 2
        output_padding = module._output_padding(
            input, output_size, module.stride, module.padding, module.kernel_size, spatial, module.dilation
        )
        return input, tuple(output_padding)

    @staticmethod
    def unbatched(module, x):
        return x[0].dim() != module.weight.dim()

    @staticmethod
    def options(module):
        return Settings(
            list(module.stride),
            list(module.padding),
            list(module.dilation),
            True,
            list(module.output_padding),
            module.groups,
        )

    @staticmethod
    def forward(options, x, parameters):
        x, output_padding = x
        settings, weight = options._replace(output_padding=list(output_padding)), parameters["weight"]
        return torch.convolution(x, weight, parameters["bias"], *settings), (x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        x, weight = saved
        kernel = zip(options.stride, options.padding, options.dilation, weight.shape[2:], strict=True)
        least = [
            (size - 1) * stride - 2 * padding + dilation * (k - 1) + 1
            for size, (stride, padding, dilation, k) in zip(x.shape[2:], kernel, strict=True)
        ]
        settings = options._replace(output_padding=[size - m for size, m in zip(d.shape[2:], least, strict=True)])
        grad_input = settings.input_gradient(d, x, weight) if "input" in wanted else None
        return (grad_input, None), contributions_of(d, x, weight, settings, wanted)
