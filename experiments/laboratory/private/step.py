"""The private gradient: clipped example by example, with noise, from one forward and two backward passes.

    g~ = (1/B) (sum_b min(1, C/||g_b||) g_b + sigma C xi)        xi ~ N(0, I)        Abadi et al. 2016, algorithm 1

The first backward pass has the norms ||g_b||; the second one is of the losses, each weighted by its factor, so that no
gradient of an example is ever kept: ghost clipping (Li et al. 2022, arXiv:2110.05679; Bu et al. 2023,
arXiv:2210.00038). B is the expected batch size: what a sum is divided by must not tell how many examples were drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats

SLACK = 1e-6  # beside a norm, as Opacus has it: what is clipped is a little below C


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """min(1, C/||g_b||) (B,)."""
    return (max_norm / (norms + SLACK)).clamp(max=1.0)


class PrivateGradient:
    """Leaves g~ in the .grad of the model's parameters. max_norm is C, noise_multiplier sigma; noise is drawn for the
    parameters in the order of the model, as Opacus draws it."""

    def __init__(
        self, model: nn.Module, max_norm: float, noise_multiplier: float, batch_size: float, generator: torch.Generator
    ) -> None:
        self.max_norm, self.noise_multiplier, self.batch_size = max_norm, noise_multiplier, batch_size
        self.model, self.generator = model, generator
        self.parameters = list(model.parameters())
        # The loss is a sum, so that the norms are those of the losses of examples, whatever their number.
        self.statistics = gradstats.attach(model, "norms", loss_reduction="sum")
        self.clipped = 0.0

    @property
    def noise_variance(self) -> float:
        """Of each element of g~, (sigma C / B)^2; 0 without noise, where C may be inf."""
        return (self.noise_multiplier * self.max_norm / self.batch_size) ** 2 if self.noise_multiplier else 0.0

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Of these examples, of which there may be none. `clipped` is then the share of them that were."""
        for p, total in zip(self.parameters, self._clipped_sum(x, y), strict=True):
            p.grad = (total + self._noise(p)) / self.batch_size

    def _clipped_sum(self, x: Tensor, y: Tensor) -> list[Tensor]:
        self.clipped = 0.0
        if not len(x):
            return [torch.zeros_like(p) for p in self.parameters]
        self.model.zero_grad()
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        losses.sum().backward(retain_graph=True)
        factors = clip_factors(self.statistics.norms.total, self.max_norm)
        self.clipped = float((factors < 1).double().mean())
        return list(torch.autograd.grad(factors @ losses, self.parameters))

    def _noise(self, p: Tensor) -> Tensor | float:
        if not self.noise_multiplier:
            return 0.0
        return torch.normal(
            0, self.noise_multiplier * self.max_norm, p.shape, generator=self.generator, dtype=p.dtype, device=p.device
        )
