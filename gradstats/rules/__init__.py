"""One file per kind of layer; importing this package fills the registry."""

from gradstats.rules import convolution, embedding, fallback, linear, normalization
from gradstats.rules.registry import RULES, Rule, find, rule

__all__ = ["RULES", "Rule", "convolution", "embedding", "fallback", "find", "linear", "normalization", "rule"]
