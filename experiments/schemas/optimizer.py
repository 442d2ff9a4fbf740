"""Members of the group `optimizer`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class OptimizerConfig:
    """lr and all else are values tuned at batch_size; the method says what they become at the run's batch size."""

    name: str = MISSING
    label: str = MISSING
    lr: float = MISSING
    batch_size: int = MISSING


@dataclass
class SGDConfig(OptimizerConfig):
    momentum: float = 0.0


@dataclass
class AdamConfig(OptimizerConfig):
    betas: tuple[float, float] = MISSING
    eps: float = MISSING


@dataclass
class BatchInvariantAdamConfig(AdamConfig):
    reference_batch_size: float | None = MISSING
    source: str = MISSING
    estimator: str = MISSING
    average: str = MISSING
    denominator: str = MISSING
    amsgrad: bool = MISSING


@dataclass
class BatchInvariantSGDConfig(OptimizerConfig):
    momentum: float = MISSING
    nesterov: bool = MISSING
    average: str = MISSING


@dataclass
class BatchInvariantRMSpropConfig(OptimizerConfig):
    alpha: float = MISSING
    eps: float = MISSING
    momentum: float = MISSING
    centered: bool = MISSING
    exponent: float = MISSING


@dataclass
class BatchInvariantSignSGDConfig(OptimizerConfig):
    momentum: float = MISSING
    placement: str = MISSING


@dataclass
class BatchInvariantLionConfig(OptimizerConfig):
    betas: tuple[float, float] = MISSING


@dataclass
class VarianceAdaptedSGDConfig(BatchInvariantSGDConfig):
    noise_beta: float = MISSING


@dataclass
class VarianceAdaptedAdamConfig(BatchInvariantAdamConfig):
    noise_beta: float = MISSING


@dataclass
class SaturatingSGDConfig(BatchInvariantSGDConfig):
    noise_beta: float = MISSING
    saturation: float = MISSING
    over: str = MISSING


@dataclass
class SaturatingAdamConfig(BatchInvariantAdamConfig):
    noise_beta: float = MISSING
    saturation: float = MISSING
    over: str = MISSING


@dataclass
class QuenchingSGDConfig(OptimizerConfig):
    noise_beta: float = MISSING


@dataclass
class MicrobatchAdamWConfig(AdamConfig):
    """batch_size counts examples here too."""

    weight_decay: float = MISSING
    microbatch_size: int = MISSING


@dataclass
class AdaScaleConfig(OptimizerConfig):
    momentum: float = MISSING


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "sgd": SGDConfig,
    "adam": AdamConfig,
    "batch_invariant_adam": BatchInvariantAdamConfig,
    "batch_invariant_sgd": BatchInvariantSGDConfig,
    "batch_invariant_rmsprop": BatchInvariantRMSpropConfig,
    "batch_invariant_sign_sgd": BatchInvariantSignSGDConfig,
    "batch_invariant_lion": BatchInvariantLionConfig,
    "variance_adapted_sgd": VarianceAdaptedSGDConfig,
    "variance_adapted_adam": VarianceAdaptedAdamConfig,
    "saturating_sgd": SaturatingSGDConfig,
    "saturating_adam": SaturatingAdamConfig,
    "quenching_sgd": QuenchingSGDConfig,
    "microbatch_adamw": MicrobatchAdamWConfig,
    "adascale": AdaScaleConfig,
}
