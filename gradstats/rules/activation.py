"""PReLU: y = max(x, 0) + w min(x, 0), with one slope, or one for each channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gradstats.contribution import Contribution
from gradstats.forms.dense import PositionSum
from gradstats.rules.registry import Rule, rule


@rule(nn.PReLU)
class PReLU(Rule):
    """c_b = sum of d_bt min(x_bt, 0) over all positions that share a slope."""

    parameters = ("weight",)
    autocast = "low"

    @staticmethod
    def unbatched(module, x):
        return x.dim() < (2 if module.num_parameters > 1 else 1)

    @staticmethod
    def forward(options, x, parameters):
        return F.prelu(x, parameters["weight"]), (x, parameters["weight"])

    @staticmethod
    def backward(options, saved, d, wanted):
        x, weight = saved
        grad_input = None
        if "input" in wanted:
            slopes = weight.reshape(-1, *[1] * (x.dim() - 2)) if len(weight) > 1 else weight
            grad_input = torch.where(x > 0, d, d * slopes)
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            c = d * x.clamp(max=0)
            contributions["weight"] = PositionSum(c.movedim(1, -1) if len(weight) > 1 else c.unsqueeze(-1), 1)
        return grad_input, contributions
