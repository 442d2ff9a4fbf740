"""One file per kind of layer; importing this package fills the registry."""

from gradstats.rules import (
    activation,
    alone,
    bilinear,
    convolution,
    embedding,
    embedding_bag,
    fallback,
    hugging_face,
    linear,
    normalization,
    recurrent,
    transposed,
    unrolled,
)
from gradstats.rules.registry import Composite, Rule, find

__all__ = [
    "Composite",
    "Rule",
    "activation",
    "alone",
    "bilinear",
    "convolution",
    "embedding",
    "embedding_bag",
    "fallback",
    "find",
    "hugging_face",
    "linear",
    "normalization",
    "recurrent",
    "transposed",
    "unrolled",
]
