"""From values tuned at one batch size to an optimizer at another: the methods that the studies compare.

k = B / B0 is the batch size of the run over the batch size of tuning; at k = 1 every rule changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gradstats
from experiments.errors import UserError, choose
from experiments.schemas.optimizer import (
    AdamConfig,
    AdaScaleConfig,
    BatchInvariantAdamConfig,
    BatchInvariantLionConfig,
    BatchInvariantRMSpropConfig,
    BatchInvariantSGDConfig,
    BatchInvariantSignSGDConfig,
    MicrobatchAdamWConfig,
    OptimizerConfig,
    QuenchingSGDConfig,
    SaturatingAdamConfig,
    SaturatingSGDConfig,
    SGDConfig,
    VarianceAdaptedAdamConfig,
    VarianceAdaptedSGDConfig,
)
from experiments.schemas.run import EngineConfig, StatisticsDtype
from gradstats import matmul, optim
from gradstats.errors import GradstatsError
from gradstats.optim.base import ExampleOptimizer


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


RANDOM_SIGN = "random_sign"
ENGINES = ("fused", "vmap", "opacus", RANDOM_SIGN)
FUSED = EngineConfig("fused")

ADAM_RULES: dict[str, Rule] = {
    "adam": fixed,
    "adam_linear": linear,
    "adam_square_root": square_root,
    "adam_half_life": half_life,
}


def microbatch_adamw(
    parameters: Iterable[Tensor], microbatch_size: int, batch_size: int, **options: Any
) -> optim.MicrobatchAdamW:
    """It counts micro-batches, where the configuration counts examples."""
    return optim.MicrobatchAdamW(parameters, batch_size=batch_size / microbatch_size, **options)


# The library's own take tuned values as they are, whatever the batch size: a schema has their options, by name.
OURS: dict[type[OptimizerConfig], Callable[..., ExampleOptimizer]] = {
    BatchInvariantAdamConfig: optim.BatchInvariantAdam,
    BatchInvariantSGDConfig: optim.BatchInvariantSGD,
    BatchInvariantRMSpropConfig: optim.BatchInvariantRMSprop,
    BatchInvariantSignSGDConfig: optim.BatchInvariantSignSGD,
    BatchInvariantLionConfig: optim.BatchInvariantLion,
    VarianceAdaptedSGDConfig: optim.VarianceAdaptedSGD,
    VarianceAdaptedAdamConfig: optim.VarianceAdaptedAdam,
    SaturatingSGDConfig: optim.SaturatingSGD,
    SaturatingAdamConfig: optim.SaturatingAdam,
    QuenchingSGDConfig: optim.QuenchingSGD,
    MicrobatchAdamWConfig: microbatch_adamw,
    AdaScaleConfig: optim.AdaScale,
}


def build_optimizer(
    parameters: Iterable[Tensor], config: OptimizerConfig, batch_size: int, max_norm: float | None
) -> torch.optim.Optimizer:
    """The method at the batch size of the run. Raises UserError for values that the optimizer refuses.

    max_norm clips the running average of the library's optimizers; torch's cannot, and for them it is the training
    loop that clips the gradient.
    """
    try:
        if (ours := OURS.get(type(config))) is not None:
            return bounded(ours(parameters, **options(config)), max_norm)
        match config:
            case AdamConfig():
                rule = choose(ADAM_RULES, config.name, "optimizer.name")
                tuned = Hyperparameters(config.lr, config.betas, config.eps)
                scaled = rule(tuned, batch_size / config.batch_size)
                # Fused is the fastest of torch's three forms, on the CPU as on a GPU.
                return torch.optim.Adam(parameters, **asdict(scaled), fused=True)
            case SGDConfig():
                lr = config.lr * batch_size / config.batch_size
                return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, fused=True)
            case _:
                raise UserError(f"optimizer={config.name} has no schema_* of experiments/schemas/ in its defaults")
    except (ValueError, GradstatsError) as error:
        raise UserError(f"optimizer={config.name}: {error}") from error


def bounded(optimizer: ExampleOptimizer, max_norm: float | None) -> ExampleOptimizer:
    """With its running average clipped. Raises: GradstatsError if it has none that could be."""
    if max_norm is None:
        return optimizer
    for group in optimizer.param_groups:
        if "max_norm" not in group:
            raise GradstatsError(f"{type(optimizer).__name__} has no norm to clip: set train.max_norm=null")
        group["max_norm"] = max_norm
    return optimizer


def options(config: OptimizerConfig) -> dict[str, Any]:
    """What the optimizer's constructor is given."""
    return {key: value for key, value in asdict(config).items() if key not in ("name", "label")}


def step_lr(optimizer: torch.optim.Optimizer, config: OptimizerConfig, lr: float, batch_size: int) -> float:
    """What a step at the batch size of the run has for learning rate, where the optimizer's is `lr`."""
    if not isinstance(optimizer, ExampleOptimizer):
        return lr
    group = optimizer.param_groups[0] | {"lr": lr}
    return float(optimizer.values_at(group, batch_size).get("lr", lr * batch_size / config.batch_size))


def read_statistics(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The statistics that `attach` must gather for an optimizer; torch's own read none."""
    if not isinstance(optimizer, ExampleOptimizer):
        return ()
    return tuple(dict.fromkeys(name for group in optimizer.param_groups for name in optimizer.statistics(group)))


def attach_statistics(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    *more: str,
    engine: EngineConfig = FUSED,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> gradstats.Handle | None:
    """What the optimizer reads, and more; a model of which nothing is read stays plain. `generator` draws the examples
    of engine.fraction, and the signs of engine.name=random_sign. `batch_size`: that of all backward passes, if it is
    known, and the model computes in float32 and is not compiled.

    Raises: UserError for an engine that this loop cannot serve; GradstatsError for what the engine or the optimizer
    cannot do with a part of the statistics."""
    if engine.name not in ENGINES:
        raise UserError(
            f"engine.name={engine.name}: a step of this loop backpropagates a whole batch, for which there are "
            f"{', '.join(ENGINES)}"
        )
    names = tuple(dict.fromkeys((*read_statistics(optimizer), *more)))
    if not names:
        return None
    microbatch_size = config.microbatch_size if isinstance(config, MicrobatchAdamWConfig) else None
    if batch_size == 1 and engine == FUSED and names == ("second_moment",) and microbatch_size is None:
        # An example's gradient is what the pass leaves: exact too, and in half the time of a look into each layer.
        return gradstats.attach(model, *names, engine="microbatch")
    draws = engine.fraction < 1 or engine.name == RANDOM_SIGN
    return gradstats.attach(
        model,
        *names,
        engine=engine.name,
        granularity=engine.granularity if microbatch_size is None else "microbatch",
        microbatch_size=microbatch_size,
        statistics_dtype=None if engine.statistics_dtype is StatisticsDtype.exact else torch.bfloat16,
        every=engine.every,
        fraction=engine.fraction,
        probes=engine.probes,
        generator=generator if draws else None,
    )


def rounding(engine: EngineConfig, device: torch.device) -> Literal["hardware", "emulated"] | None:
    """What rounds matmuls of statistics where any are rounded, None where all are exact."""
    if engine.statistics_dtype is StatisticsDtype.exact:
        return None
    if matmul.supports(device, torch.bfloat16):
        return "hardware"
    return "emulated" if engine.statistics_dtype is StatisticsDtype.emulated else None


def backpropagate(losses: Tensor, examples: int, statistics: gradstats.Handle | None) -> Tensor:
    """The mean loss (), detached. `losses` is that, or has an entry a target for engine "random_sign", whose statistics
    want the losses of examples."""
    if losses.dim() == 0 or statistics is None:
        losses.mean().backward()
        return losses.detach().mean()
    return statistics.backward(losses.view(examples, -1).mean(1))


def stepper(optimizer: torch.optim.Optimizer, batch_size: int | None) -> Callable[[], Any]:
    """Takes a step; the library's own are told the batch size where no statistics know it."""
    if isinstance(optimizer, ExampleOptimizer):
        return partial(optimizer.step, batch_size=batch_size)
    return optimizer.step
