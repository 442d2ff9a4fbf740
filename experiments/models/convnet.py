"""A small convolutional network."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from experiments.errors import UserError
from experiments.models.dropout import StreamDropout, check_dropout
from experiments.schemas.model import ConvnetConfig

KERNEL = 3


def convnet(config: ConvnetConfig, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    if len(shape) != 3:
        raise UserError(f"model=convnet needs images, and an example here has shape {shape}: choose model=mlp")
    if min(shape[1:]) < 2 ** len(config.channels):
        raise UserError(
            f"model.channels={config.channels} halves the image {len(config.channels)} times, "
            f"and it has {shape[1]} x {shape[2]} pixels: give fewer channels"
        )
    check_dropout(config.dropout)
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
    layers.append(nn.Flatten())
    if config.dropout > 0:
        layers.append(StreamDropout(config.dropout))
    height, width = (size >> len(config.channels) for size in shape[1:])
    return nn.Sequential(*layers, nn.Linear(channels[-1] * height * width, classes))
