"""Runs on the digits by either step, in units of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.laboratory.digits import examples, log_spaced, losses, network, training
from experiments.laboratory.problem import predictions
from gradstats.optim import BatchInvariantRMSprop

METHODS = {0.5: "batch_invariant_rmsprop", 1.0: "batch_invariant_rmsprop_squared"}
ALPHA = 0.999  # as in the configuration of both
POINTS = 12


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def rescaled(model: nn.Sequential, scale: float) -> nn.Sequential:
    """The same function of weights and biases divided by `scale` in the first layer, by 1/scale in the next, and so on,
    and of outputs that are multiplied by it again."""
    layers: list[nn.Module] = []
    for layer in model:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                for p in layer.parameters():
                    p.div_(scale)
            layers.append(Scale(scale))
            scale = 1 / scale
    return nn.Sequential(*layers)


def rmsprop(
    model: nn.Sequential, exponent: float, lr: float, floor: float, batch_size: int, scales: Sequence[float]
) -> Callable[[float], None]:
    """Its step, g / (s^exponent + floor^(2 exponent)), with the floor, a gradient, times each layer's scale.

    s is debiased: how it starts from zero is another question than its unit.
    """
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    groups = [
        {"params": list(layer.parameters()), "eps": (floor * scale) ** (2 * exponent)}
        for layer, scale in zip(linear, scales, strict=True)
    ]
    optimizer = BatchInvariantRMSprop(
        groups,
        lr=lr,
        alpha=ALPHA,
        batch_size=batch_size,
        source="squared_batch_mean",
        exponent=exponent,
        average="debiased_ewma",
    )

    def step(multiplier: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * multiplier
        optimizer.step(batch_size=batch_size)

    return step


def trained(
    exponent: float,
    units: str,
    weight_scale: float,
    loss_scale: float,
    batch_size: int,
    warmup: int,
    lr: float,
    floor: float,
    seed: int,
    epochs: float,
) -> float:
    """Final training loss. The floor is the same in all units, as an optimizer's eps is."""
    model = rescaled(network(seed), weight_scale)
    counts = log_spaced(batch_size, epochs, POINTS)
    step = rmsprop(model, exponent, lr, floor, batch_size, (1, 1))
    steps = training(model, step, batch_size=batch_size, seed=seed, warmup=warmup, counts=counts, loss_scale=loss_scale)
    return losses(model, steps, len(counts))[-1]


def deviation(
    exponent: float,
    units: str,
    weight_scale: float,
    loss_scale: float,
    batch_size: int,
    warmup: int,
    lr: float,
    floor: float,
    floor_in_units: bool,
    seed: int,
    steps: int,
) -> list[float]:
    """||f - f'|| / ||f|| of the logits of the training set after `step_counts` steps, in float64.

    f is of training in the original units, f' in the others.
    """

    def logits(weight_scale: float, loss_scale: float) -> list[Tensor]:
        model = rescaled(network(seed).double(), weight_scale)
        # What the gradient of each layer is multiplied by.
        scales = (weight_scale * loss_scale, loss_scale / weight_scale) if floor_in_units else (1.0, 1.0)
        step = rmsprop(model, exponent, lr, floor, batch_size, scales)
        counts = [batch_size * n for n in step_counts(steps)]
        walk = training(
            model, step, batch_size=batch_size, seed=seed, warmup=warmup, counts=counts, loss_scale=loss_scale
        )
        return [predictions(model, examples(torch.float64).x) for _ in walk]

    pairs = zip(logits(1.0, 1.0), logits(weight_scale, loss_scale), strict=True)
    return [((f - other).norm() / f.norm()).item() for f, other in pairs]


def step_counts(steps: int) -> list[int]:
    """Powers of two up to it, and it."""
    return sorted({2**i for i in range(steps.bit_length())} | {steps})
