"""All of a run: the groups that have one schema, and the whole configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from experiments.laboratory.schemas import StudyConfig
from experiments.schemas.data import DataConfig
from experiments.schemas.model import ModelConfig
from experiments.schemas.optimizer import OptimizerConfig


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Decay(StrEnum):
    none = "none"
    linear = "linear"
    cosine = "cosine"


class StatisticsDtype(StrEnum):
    exact = "exact"
    bfloat16 = "bfloat16"
    emulated = "emulated"


class TrackerMode(StrEnum):
    offline = "offline"
    online = "online"


class Searched(StrEnum):
    """The loss that a search minimises."""

    train = "train"
    test = "test"


@dataclass
class EngineConfig:
    """granularity: what counts as one, "example" or "token"; probes: backward passes of engine random_sign."""

    name: str = MISSING
    granularity: str = "example"
    probes: int = 1
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
    tags: list[str] = field(default_factory=list)


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
class Dimension:
    """The values that a search may give to one key: those from low to high, or one of the choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list[Any] | None = None


@dataclass
class SearchConfig:
    """space: dimensions by key of the configuration, as in train.batch_size; a group, as in optimizer, is a key too."""

    space: dict[str, Dimension] = MISSING
    loss: Searched = MISSING
    trials: int = MISSING
    startup: int = MISSING
    prune_after: float = MISSING
    seeds: list[int] = MISSING
    confirm_seeds: list[int] = MISSING
    sampler_seed: int = MISSING


@dataclass
class TuneConfig:
    """The values are tuned at batch_size, and what they cost is measured at `factor` times it.

    share: of the budget, for the first look at all learning rates; memory_gb: what a step may take, in 1e9 bytes; null:
    all that is free on a GPU, and half of the machine's memory without one.
    """

    batch_size: int = MISSING
    reference_batch_sizes: list[float | None] = MISSING
    horizons: list[float] = MISSING
    share: float = MISSING
    seeds: list[int] = MISSING
    factor: int = MISSING
    memory_gb: float | None = MISSING
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
    search: SearchConfig | None = None
    tune: TuneConfig | None = None
