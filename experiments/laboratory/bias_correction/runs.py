"""A run on the digits with one of the variants."""

from __future__ import annotations

from experiments.laboratory.bias_correction.moments import VARIANTS, Moments
from experiments.laboratory.digits import log_spaced, losses, network, training

POINTS = 20


def trained(
    variant: str,
    warmup: int,
    lr: float,
    seed: int,
    batch_size: int,
    epochs: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[float]:
    """The learning curve: training losses at `log_spaced` counts of examples."""
    model = network(seed)
    moments = Moments(model.parameters(), VARIANTS[variant], (beta1, beta2), eps)
    counts = log_spaced(batch_size, epochs, POINTS)
    steps = training(
        model, lambda k: moments.step(lr * k), batch_size=batch_size, seed=seed, warmup=warmup, counts=counts
    )
    return losses(model, steps, len(counts))
