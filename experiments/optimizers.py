"""From values tuned at one batch size to an optimizer at another: the methods that the studies compare.

k = B / B0 is the batch size of the run over the batch size of tuning; at k = 1 every rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from experiments.config import AdamConfig, BatchInvariantAdamConfig, OptimizerConfig, SGDConfig
from experiments.errors import UserError, choose
from gradstats.optim import BatchInvariantAdam


@dataclass(frozen=True)
class Hyperparameters:
    lr: float
    betas: tuple[float, float]
    eps: float


Rule = Callable[[Hyperparameters, float], Hyperparameters]


def fixed(tuned: Hyperparameters, k: float) -> Hyperparameters:
    return tuned


def linear(tuned: Hyperparameters, k: float) -> Hyperparameters:
    """lr k (Goyal 2017)."""
    return replace(tuned, lr=tuned.lr * k)


def square_root(tuned: Hyperparameters, k: float) -> Hyperparameters:
    """lr sqrt(k), 1 - (1 - beta) k, eps / sqrt(k) (Malladi 2022). A beta that would be negative is 0: no average."""
    first, second = (max(0.0, 1 - (1 - beta) * k) for beta in tuned.betas)
    return Hyperparameters(tuned.lr * sqrt(k), (first, second), tuned.eps / sqrt(k))


def half_life(tuned: Hyperparameters, k: float) -> Hyperparameters:
    """beta^k, which keeps the half-life of both averages in examples (Marek 2025), with lr sqrt(k)."""
    first, second = (beta**k for beta in tuned.betas)
    return Hyperparameters(tuned.lr * sqrt(k), (first, second), tuned.eps)


ADAM_RULES: dict[str, Rule] = {
    "adam": fixed,
    "adam_linear": linear,
    "adam_square_root": square_root,
    "adam_half_life": half_life,
}


def needs_statistics(config: OptimizerConfig) -> bool:
    return isinstance(config, BatchInvariantAdamConfig)


def build_optimizer(
    parameters: Iterable[Tensor], config: OptimizerConfig, batch_size: int, max_norm: float | None
) -> torch.optim.Optimizer:
    """The method at the batch size of the run. Raises UserError for values that the optimizer refuses.

    max_norm clips the running average of batch-size-invariant Adam; torch's optimizers cannot, and for them it is the
    training loop that clips the gradient.
    """
    try:
        match config:
            case BatchInvariantAdamConfig():
                return BatchInvariantAdam(
                    parameters,
                    lr=config.lr,
                    betas=config.betas,
                    eps=config.eps,
                    batch_size=config.batch_size,
                    reference_batch_size=config.reference_batch_size,
                    max_norm=max_norm,
                )
            case AdamConfig():
                rule = choose(ADAM_RULES, config.name, "optimizer.name")
                tuned = Hyperparameters(config.lr, config.betas, config.eps)
                scaled = rule(tuned, batch_size / config.batch_size)
                # Fused is the fastest of torch's three forms, on the CPU as on a GPU.
                return torch.optim.Adam(parameters, **asdict(scaled), fused=True)
            case SGDConfig():
                return torch.optim.SGD(parameters, lr=config.lr * batch_size / config.batch_size, fused=True)
            case _:
                raise UserError(f"optimizer={config.name} has no schema_* of experiments/config.py in its defaults")
    except ValueError as error:
        raise UserError(f"optimizer={config.name}: {error}") from error
