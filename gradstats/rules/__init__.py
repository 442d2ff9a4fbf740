"""One file per kind of layer; importing this package fills the registry."""

from gradstats.rules import convolution, embedding, fallback, linear, normalization
from gradstats.rules.registry import Rule, find

__all__ = ["Rule", "convolution", "embedding", "fallback", "find", "linear", "normalization"]
