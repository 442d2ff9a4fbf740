"""Models without batch normalisation, which would mix the examples of a batch; one module a kind."""

from __future__ import annotations

from torch import nn

from experiments.errors import UserError
from experiments.models.convnet import convnet
from experiments.models.language import gpt
from experiments.models.mlp import mlp
from experiments.models.resnet import resnet
from experiments.schemas.model import ConvnetConfig, GPTConfig, MLPConfig, ModelConfig, ResNetConfig

__all__ = ["build_model"]


def build_model(config: ModelConfig, shape: tuple[int, ...], classes: int, discrete: bool = False) -> nn.Module:
    """(N, *shape) -> (N, classes), a classifier; or of discrete examples, (N, T) -> (N, T, classes).

    Raises UserError if the model cannot take such examples.
    """
    if discrete != isinstance(config, GPTConfig):
        raise UserError(
            f"model={config.name} does not read this data: choose model=gpt for text, and another model for the rest"
        )
    match config:
        case MLPConfig():
            return mlp(config, shape, classes)
        case ConvnetConfig():
            return convnet(config, shape, classes)
        case ResNetConfig():
            return resnet(config, shape, classes)
        case GPTConfig():
            return gpt(config, shape, classes)
        case _:
            raise UserError(f"model={config.name} has no schema_* of experiments/schemas/ in its defaults")
