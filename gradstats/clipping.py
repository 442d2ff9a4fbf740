"""Clipping that statistics follow: p.grad <- f p.grad for all parameters makes every contribution c_b <- f c_b.

Raw sums stay as they are. `Left` keeps f, and a window's `scale`, g_b = scale c_b, carries it into every statistic.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median_low
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gradstats.distributed.local import whole
from gradstats.errors import LifetimeError
from gradstats.gradient import Left, fingerprint

if TYPE_CHECKING:
    from gradstats.handle import Handle


def clip(handle: Handle, max_norm: float) -> Tensor:
    """See `Handle.clip_grad_norm_`. Waits for the device."""
    parameters = {name: p for name, p in handle.parameters().items() if p.grad is not None}
    norm = get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    f = float((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as clip_grads_with_norm_ has it
    found = list(followed(handle))
    factors = []
    for name, gradient, left in found:
        factor = handle.factor(name, parameters[name])
        if not left.fits(gradient):
            raise LifetimeError(
                f"the gradient of '{name}' was changed after the backward pass, before stats.clip_grad_norm_: it no "
                f"longer fits its statistics. Clip first, and name a GradScaler: attach(..., grad_scaler=scaler)"
            )
        if handle.loss_scale is not None:
            factor /= handle.loss_scale.divided(name, parameters[name], factor)
        factors.append(f * factor)
    clip_grads_with_norm_(parameters.values(), max_norm, norm)
    for (_, gradient, left), factor in zip(found, factors, strict=True):
        left.multiplied(gradient, factor)
    return whole(norm)


def recognise(handle: Handle) -> None:
    """Finds the f by which every p.grad was multiplied since the backward pass, from fingerprints of before and after.

    f is the median over parameters of the ratio of norms, and every parameter's two numbers must agree with it, up to
    rounding. Does nothing where all gradients were zeroed, and are not there to tell. Waits for the device.

    Raises: LifetimeError naming the first parameter whose gradient was changed in another way.
    """
    found = [(name, g, left, left.fingerprint) for name, g, left in followed(handle) if left.fingerprint is not None]
    prints = [noted for *_, noted in found] + [fingerprint(g) for _, g, _, _ in found]
    rows = torch.stack([one.to(prints[0].device) for one in prints]).double().tolist()
    before, after = rows[: len(found)], rows[len(found) :]
    ratios = [b / a for (a, _), (b, _) in zip(before, after, strict=True) if a != 0]
    if ratios and not any(ratios):
        return
    f = median_low(ratios or [1.0])
    for (name, g, _, noted), old, new in zip(found, before, after, strict=True):
        slack = old[0] * f * slack_of(g.dtype, noted.dtype) + torch.finfo(noted.dtype).tiny ** 0.5
        if any(abs(b - f * a) > slack for a, b in zip(old, new, strict=True)):  # false where anything is nan
            raise LifetimeError(
                f"the gradient of '{name}' {tuple(g.shape)} was changed after the backward pass, and not by the factor "
                f"{f:.4g} that most were: statistics cannot follow. Clip the norm over all attached parameters at "
                f"once, or with the optimizer's max_norm"
            )
    for _, g, left, _ in found:
        left.multiplied(g, f)


def followed(handle: Handle) -> Iterator[tuple[str, Tensor, Left]]:
    """By name, p.grad that statistics go with, and what is known of it."""
    for name, p in handle.parameters().items():
        left = handle.left(name)
        if p.grad is not None and left is not None and handle.has(name):
            yield name, p.grad, left


def slack_of(gradient: torch.dtype, noted: torch.dtype) -> float:
    """Rounding of f g to the gradient's dtype, and of the sums of a fingerprint."""
    return 4 * torch.finfo(gradient).eps + 64 * torch.finfo(noted).eps
