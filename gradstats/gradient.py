"""Is p.grad as a backward pass left it? Statistics go with one gradient, and must not be read beside another."""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch import Tensor

from gradstats.distributed.local import local

State = tuple[int, int]

COLUMNS = 512  # in which a fingerprint lays a gradient out: short enough for float32 sums to keep their digits


class Left:
    """p.grad of one parameter as the last backward pass left it, and by what it was multiplied since."""

    __slots__ = ("factor", "fingerprint", "known", "sample", "state", "tensor")

    def __init__(self, gradient: Tensor, sampled: bool = False, followed: bool = False):
        self.state = self.known = state_of(gradient)
        self.tensor = weakref.ref(gradient)  # an address is given again
        self.sample = sample(gradient) if sampled else None
        self.fingerprint = fingerprint(gradient) if followed else None
        self.factor: float | None = None if followed else 1.0  # None: not known yet

    def multiplied(self, gradient: Tensor, factor: float) -> None:
        """p.grad is `factor` times what the backward pass left."""
        self.known, self.factor = state_of(gradient), factor
        if self.sample is not None:
            self.sample = sample(gradient)

    def fits(self, gradient: Tensor | None) -> bool:
        """Whether p.grad is still what is known of it. Waits for the device if it was sampled."""
        if gradient is None or self.known != state_of(gradient):
            return False
        return self.sample is None or same_sample(gradient, self.sample)


def state_of(gradient: Tensor) -> State:
    """Address and version: a gradient that has both still was not changed by an operation of autograd's."""
    plain = type(gradient) is Tensor and not gradient.is_sparse  # mostly, and sooner known than looked into
    # Not the version of a DTensor's memory, which other parameters share.
    return (gradient if plain else values_of(gradient)).data_ptr(), gradient._version


def values_of(gradient: Tensor) -> Tensor:
    """Those that are here."""
    values = local(gradient.detach())
    return values._values() if values.is_sparse else values


def untouched(gradient: Tensor | None, left: Left | None) -> bool:
    """Whether p.grad is as the backward pass left it: another tensor may have got its address."""
    if gradient is None or left is None:
        return False
    return left.tensor() is gradient and left.state == state_of(gradient)


def fresh(gradient: Tensor | None, known: bool) -> bool:
    """Whether the next gradient is the first since zero_grad(), whichever way it zeroed; one that is `known` to be as a
    backward pass left it is not looked into."""
    return gradient is None or (not known and not bool(gradient.any()))


def sample(gradient: Tensor) -> Tensor:
    """Sixteen entries, in which shows what leaves no mark on the tensor: GradScaler.unscale_, changes of .data."""
    values = values_of(gradient)
    return values.reshape(-1)[:: max(1, values.numel() // 16)][:16].clone()


def same_sample(gradient: Tensor, noted: Tensor) -> bool:
    return torch.allclose(sample(gradient), noted, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def fingerprint(gradient: Tensor) -> Tensor:
    """||g|| and <r, g> for a random r (2,): both are multiplied by f where g is, and by nothing else that is likely to
    happen to a gradient. r is an outer product, so that g is read but not copied."""
    values = values_of(gradient).reshape(-1)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    with torch.autocast(values.device.type, enabled=False):  # a backward pass may run inside of it
        return numbers_of(values)


def numbers_of(values: Tensor) -> Tensor:
    n = len(values) // COLUMNS
    rows, rest = values[: n * COLUMNS].view(n, COLUMNS), values[n * COLUMNS :]
    across = direction(COLUMNS, values.dtype, values.device)
    squares = torch.linalg.vector_norm(rows, dim=1).square().sum() + rest.square().sum()
    along = (rows @ across * direction(n, values.dtype, values.device)).sum() + rest @ across[: len(rest)]
    return torch.stack([squares.sqrt(), along])


@cache
def direction(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers in [-1, 1], always the same."""
    numbers = torch.rand(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    return (2 * numbers - 1).to(device, dtype)
