"""Bilinear: y_nto = sum_ij w_oij x_nti z_ntj + b_o."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gradstats.contribution import Contribution
from gradstats.forms.dense import PositionSum
from gradstats.forms.products import Products
from gradstats.rules.registry import Rule, rule


@rule(nn.Bilinear)
class Bilinear(Rule):
    """c_b = sum_t d_bt x_bt^T z_bt^T for the weight, sum_t d_bt for the bias; any number of position dimensions."""

    inputs = ("input1", "input2")
    autocast = "float32"
    leading_alike = True

    @staticmethod
    def bind(module, input1, input2):
        return input1, input2

    @staticmethod
    def unbatched(module, x):
        return x[0].dim() < 2

    @staticmethod
    def forward(options, x, parameters):
        weight = parameters["weight"]
        return F.bilinear(*x, weight, parameters["bias"]), (*x, weight)

    @staticmethod
    def backward(options, saved, d, wanted):
        x, z, weight = saved
        gradients = None, None
        if not wanted.isdisjoint(Bilinear.inputs):
            gradients = torch.func.vjp(lambda x, z: F.bilinear(x, z, weight), x, z)[1](d)
        contributions: dict[str, Contribution] = {}
        if "weight" in wanted:
            contributions["weight"] = Products(*(f.reshape(len(f), -1, f.shape[-1]) for f in (d, x, z)))
        if "bias" in wanted:
            contributions["bias"] = PositionSum(d, 1)
        return gradients, contributions
