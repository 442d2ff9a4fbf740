"""Layers of transformers, found by name: the library does not import it."""

from __future__ import annotations

import torch.nn.functional as F

from gradstats.contribution import Contribution
from gradstats.forms.dense import PositionSum
from gradstats.rules.linear import outer
from gradstats.rules.registry import Rule, rule


@rule("transformers.pytorch_utils.Conv1D")
class Conv1D(Rule):
    """GPT-2's Linear, whose weight is (i, o): y_nto = sum_i a_nti w_io + b_o, c_b = sum_t a_bt d_bt^T."""

    autocast = "low"
    leading_alike = True

    @staticmethod
    def bind(module, x):
        return x

    @staticmethod
    def forward(options, x, parameters):
        weight = parameters["weight"]
        return F.linear(x, weight.T, parameters["bias"]), (x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        a, weight = saved
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            contributions["weight"] = outer(a, d)
        if "bias" in wanted:
            contributions["bias"] = PositionSum(d, 1)
        return d @ weight.T if "input" in wanted else None, contributions
