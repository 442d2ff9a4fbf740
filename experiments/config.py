"""The schema of the configuration: a misspelt key or a wrong type fails at composition, with the key's name.

The values, and the reasons for them, are in conf/. A group whose members differ in their keys has one class a member,
registered as the group's `schema_*` and named first in the member's defaults.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"

# None of these decides a number: two runs that differ only here are the same run.
NOT_IN_FINGERPRINT = frozenset({"name", "directory", "resume", "tracker"})

POSITIVE = (
    "train.batch_size",
    "train.epochs",
    "train.max_norm",
    "train.log_every_examples",
    "train.checkpoint_every_examples",
    "evaluation.count",
    "evaluation.multiple",
    "hardware.threads",
    "optimizer.lr",
    "optimizer.batch_size",
)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Decay(StrEnum):
    none = "none"
    linear = "linear"
    cosine = "cosine"


class Normalisation(StrEnum):
    none = "none"
    layer = "layer"


class StatisticsDtype(StrEnum):
    exact = "exact"
    bfloat16 = "bfloat16"


class TrackerMode(StrEnum):
    offline = "offline"
    online = "online"


@dataclass
class DataConfig:
    name: str = MISSING
    path: str | None = None
    test_fraction: float = MISSING
    split_seed: int = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING


@dataclass
class MLPConfig(ModelConfig):
    widths: list[int] = MISSING
    normalisation: Normalisation = MISSING
    dropout: float = MISSING


@dataclass
class ConvnetConfig(ModelConfig):
    channels: list[int] = MISSING
    groups: int = MISSING


@dataclass
class OptimizerConfig:
    """lr and all else are values tuned at batch_size; the method says what they become at the run's batch size."""

    name: str = MISSING
    label: str = MISSING
    lr: float = MISSING
    batch_size: int = MISSING


@dataclass
class SGDConfig(OptimizerConfig):
    pass


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


@dataclass
class EngineConfig:
    name: str = MISSING
    statistics_dtype: StatisticsDtype = StatisticsDtype.exact
    every: int = 1
    fraction: float = 1.0


@dataclass
class TrackerConfig:
    name: str = MISSING
    mode: TrackerMode = TrackerMode.offline
    detail: bool = False
    project: str = "gradstats"
    group: str | None = None
    job_type: str = "train"
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclass
class HardwareConfig:
    threads: int = MISSING
    bf16: bool = MISSING
    compile: bool = MISSING
    tf32: bool = MISSING


@dataclass
class TrainConfig:
    batch_size: int = MISSING
    epochs: float = MISSING
    warmup_examples: int = MISSING
    decay: Decay = MISSING
    max_norm: float | None = MISSING
    log_every_examples: int = MISSING
    checkpoint_every_examples: int = MISSING


@dataclass
class EvaluationConfig:
    count: int = MISSING
    multiple: int = MISSING


@dataclass
class StudyConfig:
    """Every method runs with the same number of learning rates: lr_multipliers times its own default."""

    note: str = MISSING
    ours: list[str] = MISSING
    baselines: list[str] = MISSING
    reference: str = MISSING
    tuning_batch_size: int = MISSING
    lr_multipliers: list[float] = MISSING
    batch_sizes: list[int] = MISSING
    score_batch_sizes: list[int] = MISSING
    seeds: list[int] = MISSING
    workers: int | None = MISSING


@dataclass
class Config:
    name: str = MISSING
    directory: str = MISSING
    seed: int = MISSING
    device: Device = MISSING
    resume: bool = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    engine: EngineConfig = MISSING
    tracker: TrackerConfig = MISSING
    hardware: HardwareConfig = MISSING
    train: TrainConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    study: StudyConfig | None = None


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


def register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="model", name="schema_mlp", node=MLPConfig)
    store.store(group="model", name="schema_convnet", node=ConvnetConfig)
    for name, node in OPTIMIZERS.items():
        store.store(group="optimizer", name=f"schema_{name}", node=node)


register()


def as_config(composed: DictConfig) -> Config:
    """Hydra's result as dataclasses. Raises OmegaConf's own error for a value that is still missing."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def is_lasting(composed: DictConfig) -> bool:
    """Whether the directory is the same at every start, as resuming needs."""
    unresolved = OmegaConf.to_container(composed, resolve=False)
    return isinstance(unresolved, dict) and "${now" not in str(unresolved["directory"])


def compose_config(overrides: Sequence[str]) -> Config:
    """The configuration that `python -m experiments.train *overrides` would run with."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return as_config(compose("config", overrides=list(overrides)))


def check_ranges(config: Config) -> None:
    """Raises UserError for a number that no run can use."""
    for key in POSITIVE:
        value = attrgetter(key)(config)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} must be positive")
    if config.seed < 0:
        raise UserError(f"seed={config.seed} must not be negative")
    # A resumed run begins with a step that gathers: so must the step after the checkpoint in a run that goes on.
    apart, between = config.engine.every * config.train.batch_size, config.train.checkpoint_every_examples
    if config.engine.every > 1 and between % apart:
        raise UserError(
            f"train.checkpoint_every_examples={between} must be a multiple of engine.every * train.batch_size = "
            f"{apart}, or a resumed run would be another one"
        )


def as_dict(config: Config) -> dict[str, Any]:
    """Plain numbers, strings, lists and dictionaries."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def identity(config: Config) -> dict[str, Any]:
    """The part of the configuration that decides the numbers of a run."""
    return {key: value for key, value in as_dict(config).items() if key not in NOT_IN_FINGERPRINT}


def fingerprint(config: Config) -> str:
    """Sixteen hexadecimal digits that identify `identity(config)`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first key, in dotted form, at which two identities differ, with both values; None if they are equal."""
    old_values, new_values = dict(_flatten(old)), dict(_flatten(new))
    for key in [*new_values, *old_values]:
        before, after = (values.get(key, "absent") for values in (old_values, new_values))
        if before != after:
            return f"{key} was {before} and is now {after}"
    return None


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
