"""Small models without batch normalisation, which would mix the examples of a batch."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from experiments.config import ConvnetConfig, MLPConfig, ModelConfig, Normalisation
from experiments.errors import UserError

KERNEL = 3


def build_model(config: ModelConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A classifier of examples of this shape: (N, *shape) -> (N, classes).

    Raises UserError if the model cannot take such examples.
    """
    match config:
        case MLPConfig():
            return mlp(config, shape, classes)
        case ConvnetConfig():
            return convnet(config, shape, classes)
        case _:
            raise UserError(f"model.name={config.name} is unknown: choose model=mlp or model=convnet")


class StreamDropout(nn.Dropout):
    """Dropout whose mask belongs to the position in the stream of examples, as the example itself does.

    On the CPU, torch.rand draws number after number: a batch of 4 gets the masks of 4 batches of 1, where nn.Dropout
    draws for a whole batch at once. Runs that differ in the batch size alone share masks as they share examples.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand_like(x) >= self.p) / (1 - self.p)


def mlp(config: MLPConfig, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout} must be at least 0 and less than 1")
    layers: list[nn.Module] = [nn.Flatten()]
    widths = [prod(shape), *config.widths]
    for inputs, outputs in pairwise(widths):
        layers.append(nn.Linear(inputs, outputs))
        if config.normalisation is Normalisation.layer:
            layers.append(nn.LayerNorm(outputs))
        layers.append(nn.ReLU())
        if config.dropout > 0:
            layers.append(StreamDropout(config.dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def convnet(config: ConvnetConfig, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    if len(shape) != 3:
        raise UserError(f"model=convnet needs images, and an example here has shape {shape}: choose model=mlp")
    if min(shape[1:]) < 2 ** len(config.channels):
        raise UserError(
            f"model.channels={config.channels} halves the image {len(config.channels)} times, "
            f"and it has {shape[1]} x {shape[2]} pixels: give fewer channels"
        )
    layers: list[nn.Module] = []
    channels = [shape[0], *config.channels]
    for inputs, outputs in pairwise(channels):
        if outputs % config.groups:
            raise UserError(f"model.groups={config.groups} does not divide {outputs}, one of model.channels")
        layers += [
            nn.Conv2d(inputs, outputs, KERNEL, padding="same"),
            nn.GroupNorm(config.groups, outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    height, width = (size >> len(config.channels) for size in shape[1:])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, classes))
