"""Is p.grad as a backward pass left it? Statistics go with one gradient, and must not be read beside another."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[int, int]


def state_of(gradient: Tensor) -> State:
    """Address and version: a gradient that has both still was not changed by an operation of autograd's."""
    values = gradient._values() if gradient.is_sparse else gradient
    return values.data_ptr(), gradient._version


def untouched(gradient: Tensor | None, left: State | None) -> bool:
    """Whether p.grad is as it was when its state was `left`."""
    return gradient is not None and left == state_of(gradient)


def fresh(gradient: Tensor | None, left: State | None) -> bool:
    """Whether the next gradient is the first since zero_grad(), whichever way it zeroed."""
    return gradient is None or (not untouched(gradient, left) and not bool(gradient.any()))


def sample(gradient: Tensor) -> Tensor:
    """Sixteen entries, in which shows what leaves no mark on the tensor: GradScaler.unscale_, changes of .data."""
    values = gradient.detach()._values() if gradient.is_sparse else gradient.detach()
    return values.reshape(-1)[:: max(1, values.numel() // 16)][:16].clone()


def same_sample(gradient: Tensor, noted: Tensor | None) -> bool:
    return noted is None or torch.allclose(sample(gradient), noted, rtol=0, atol=0, equal_nan=True)
