"""The equations against torch's optimizers."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.laboratory.bias_correction.moments import VARIANTS, Moments

BETAS, EPS, LR = (0.9, 0.99), 1e-3, 0.1
GRADIENTS = [torch.tensor([1.0, -2.0, 1e-3], dtype=torch.float64) * (-0.7) ** t for t in range(5)]


def trajectory(step, p: torch.Tensor) -> torch.Tensor:
    rows = []
    for gradient in GRADIENTS:
        p.grad = gradient.clone()
        step()
        rows.append(p.detach().clone())
    return torch.stack(rows)


def ours(variant: str) -> torch.Tensor:
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    moments = Moments([p], VARIANTS[variant], BETAS, EPS)
    return trajectory(lambda: moments.step(LR), p)


def test_corrected_adam_is_torchs():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=LR, betas=BETAS, eps=EPS)
    torch.testing.assert_close(ours("adam"), trajectory(optimizer.step, p), rtol=1e-12, atol=0)


def test_uncorrected_rmsprop_is_torchs_with_momentum():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    first, second = BETAS
    optimizer = torch.optim.RMSprop([p], lr=LR * (1 - first), alpha=second, eps=EPS, momentum=first)
    torch.testing.assert_close(ours("rmsprop"), trajectory(optimizer.step, p), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("variant", "factor"),
    [
        ("adam", 1.0),
        ("adam_first", 1 / math.sqrt(1 - BETAS[1])),
        ("adam_second", 1 - BETAS[0]),
        ("adam_none", (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])),
        ("rmsprop", (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])),
        ("rmsprop_both", 1.0),
    ],
)
def test_the_first_step_in_closed_form(variant: str, factor: float):
    """lr sign(g) but for eps, times what the missing corrections leave."""
    moved = (1 - ours(variant)[0])[:2]
    torch.testing.assert_close(moved, LR * factor * GRADIENTS[0][:2].sign(), rtol=0.02, atol=0)
