"""Adam's and RMSProp's equations, with the correction of either average's start from zero on or off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """first, second: whether the average of gradients, or of squares, is divided by 1 - beta^t.

    averaged_steps: RMSProp's order, in which the momentum averages what is already divided by the root.
    """

    label: str
    averaged_steps: bool
    first: bool
    second: bool


VARIANTS = {
    "adam": Variant("Adam", averaged_steps=False, first=True, second=True),
    "adam_first": Variant("Adam, mean alone corrected", averaged_steps=False, first=True, second=False),
    "adam_second": Variant("Adam, squares alone corrected", averaged_steps=False, first=False, second=True),
    "adam_none": Variant("Adam, uncorrected", averaged_steps=False, first=False, second=False),
    "rmsprop": Variant("RMSProp", averaged_steps=True, first=False, second=False),
    "rmsprop_both": Variant("RMSProp, corrected", averaged_steps=True, first=True, second=True),
}


class Moments:
    """With c_i = 1 - beta_i^t where corrected, and 1 where not, at step t:

        s <- beta_2 s + (1 - beta_2) g^2
        Adam:     m <- beta_1 m + (1 - beta_1) g
                  p <- p - lr (m / c_1) / (sqrt(s / c_2) + eps)
        RMSProp:  m <- beta_1 m + (1 - beta_1) g / (sqrt(s / c_2) + eps)
                  p <- p - lr m / c_1

    Adam with both corrections is torch.optim.Adam; RMSProp with neither is torch.optim.RMSprop with momentum beta_1 and
    the learning rate (1 - beta_1) lr.

    Source: Kingma & Ba 2015, Algorithm 1; RMSProp with momentum: Graves 2013, arXiv:1308.0850, as in torch.
    """

    def __init__(self, parameters: Iterable[Tensor], variant: Variant, betas: tuple[float, float], eps: float) -> None:
        self.parameters = list(parameters)
        self.variant = variant
        self.betas = betas
        self.eps = eps
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.s = [torch.zeros_like(p) for p in self.parameters]
        self.t = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.t += 1
        first, second = self.betas
        c1 = 1 - first**self.t if self.variant.first else 1.0
        c2 = 1 - second**self.t if self.variant.second else 1.0
        for p, m, s in zip(self.parameters, self.m, self.s, strict=True):
            assert p.grad is not None
            s.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            root = (s / c2).sqrt_().add_(self.eps)
            if self.variant.averaged_steps:
                m.lerp_(p.grad / root, 1 - first)
                p.sub_(m, alpha=lr / c1)
            else:
                m.lerp_(p.grad, 1 - first)
                p.addcdiv_(m, root, value=-lr / c1)
