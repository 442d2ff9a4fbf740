"""A multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import nn

from experiments.models.dropout import StreamDropout, check_dropout
from experiments.schemas.model import MLPConfig, Normalisation


def mlp(config: MLPConfig, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    check_dropout(config.dropout)
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
