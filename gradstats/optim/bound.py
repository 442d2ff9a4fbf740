"""max_norm: the bound on a norm over all parameters of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradstats.optim.parts import Part
from gradstats.sums import accumulation_dtype


def clip_factors(parts: Iterable[Part], bounds: Iterable[float]) -> dict[float | None, Tensor]:
    """min(1, max_norm / norm) for every max_norm in use, float64 (); the norm is Euclidean, of what every update names
    (`Update.bounded`), over all parameters of a step."""
    squares: list[Tensor] = []
    for part in parts:
        name, scale = "gradient", abs(part.scalars["mean_scale"])
        if part.update.bounded is not None:
            name, scale = part.update.bounded, part.scalars.get("bounded_scale", 1.0)
        norms = torch.stack([norm.double() * scale for norm in wide_norms(part.columns[name])])
        squares.append(part.total(norms.square().sum()))
    norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
    return {bound: (bound / norm).clamp(max=1.0) for bound in bounds}


def wide_norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Euclidean norms (), in a dtype in which squares do not overflow."""
    return torch._foreach_norm(tensors, 2, accumulation_dtype(tensors[0].dtype))
