"""What a run spends of privacy, by the accountant of Opacus: Renyi divergences of the subsampled Gaussian mechanism
(Mironov et al. 2019), for examples that are drawn each by itself with the same chance in every step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from experiments.errors import UserError


def require_opacus() -> None:
    """Raises UserError where it is not installed."""
    try:
        import opacus.accountants  # noqa: F401
    except ImportError as error:
        raise UserError(f"Opacus accounts for the privacy, and is not here: pip install opacus ({error})") from error


@cache
def noise_multiplier(epsilon: float | None, delta: float, sample_rate: float, steps: int) -> float:
    """The least sigma, within Opacus' tolerance, that spends at most (epsilon, delta); 0 for None, no privacy."""
    if epsilon is None:
        return 0.0
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        # The search begins with so much noise that its bound is loose.
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha")
        sigma = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant="rdp"
        )
    return float(sigma)


def spent(sigma: float, delta: float, sample_rate: float, steps: int) -> float:
    """epsilon."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, sample_rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


def poisson(examples: int, sample_rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (B,) of each step: every example with this chance, by itself. B varies, and may be 0."""
    for _ in range(steps):
        yield (torch.rand(examples, generator=generator) < sample_rate).nonzero().squeeze(1)


def steps_of(epochs: float, sample_rate: float) -> int:
    return max(1, round(epochs / sample_rate))
