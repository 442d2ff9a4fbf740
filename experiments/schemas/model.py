"""Members of the group `model`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING


class Normalisation(StrEnum):
    none = "none"
    layer = "layer"


@dataclass
class ModelConfig:
    name: str = MISSING


@dataclass
class MLPConfig(ModelConfig):
    widths: list[int] = MISSING
    normalisation: Normalisation = MISSING
    dropout: float = MISSING


@dataclass
class ConvnetConfig(ModelConfig):
    channels: list[int] = MISSING
    groups: int = MISSING
    dropout: float = 0.0


@dataclass
class ResNetConfig(ModelConfig):
    """`blocks` of each stage; the first stage has `width` channels, and each one after it twice as many."""

    width: int = MISSING
    blocks: list[int] = MISSING
    groups: int = MISSING
    checkpoint: bool = MISSING


@dataclass
class GPTConfig(ModelConfig):
    width: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    tied: bool = MISSING
    checkpoint: bool = MISSING


MODELS: dict[str, type[ModelConfig]] = {
    "mlp": MLPConfig,
    "convnet": ConvnetConfig,
    "resnet": ResNetConfig,
    "gpt": GPTConfig,
}
