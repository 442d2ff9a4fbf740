"""Linear: y_nto = sum_i w_oi a_nti + b_o."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gradstats.contribution import Contribution
from gradstats.forms.dense import PositionSum
from gradstats.forms.outer import Outer, OuterSum
from gradstats.rules.registry import Rule, rule


@rule(nn.Linear)
class Linear(Rule):
    """c_b = sum_t d_bt a_bt^T for the weight, sum_t d_bt for the bias; any number of position dimensions."""

    autocast = "low"
    leading_alike = True

    @staticmethod
    def forward(options, x, parameters):
        weight = parameters["weight"]
        return F.linear(x, weight, parameters["bias"]), (x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        a, weight = saved
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            contributions["weight"] = outer(d, a)
        if "bias" in wanted:
            contributions["bias"] = PositionSum(d, 1)
        return d @ weight if "input" in wanted else None, contributions


def outer(d: Tensor, a: Tensor) -> Contribution:
    """The cheapest form for d (n, ..., o) and a (n, ..., i)."""
    if d.dim() == 2:
        return Outer(d, a)
    d, a = d.reshape(d.shape[0], -1, d.shape[-1]), a.reshape(a.shape[0], -1, a.shape[-1])
    return Outer(d[:, 0], a[:, 0]) if d.shape[1] == 1 else OuterSum(d, a)
