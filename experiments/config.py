"""From conf/ to a configuration: the schemas registered, what is composed, and ranges that no schema can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.laboratory.schemas import STUDIES
from experiments.schemas.data import DATA
from experiments.schemas.model import MODELS
from experiments.schemas.optimizer import OPTIMIZERS
from experiments.schemas.run import Config, SearchConfig

CONF = Path(__file__).resolve().parents[1] / "conf"

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


def register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    groups: dict[str, Mapping[str, type]] = {"data": DATA, "model": MODELS, "optimizer": OPTIMIZERS}
    for group, members in groups.items():
        for name, node in members.items():
            store.store(group=group, name=f"schema_{name}", node=node)
    store.store(group="search", name="schema", node=SearchConfig)
    for study, settings in STUDIES.items():
        store.store(group="study", name=f"schema_{study}", node=settings)


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
    # Hydra composes once a process, or through the application that is already running.
    if GlobalHydra.instance().is_initialized():
        return as_config(compose("config", overrides=list(overrides)))
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
