"""What every study says that it reads of the configuration is what its jobs depend on, and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments import laboratory
from experiments.catalogue import read
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.laboratory.schemas import STUDIES
from experiments.schemas.run import Config, Decay, Device

OTHER: dict[str, Any] = {
    "seed": 1,
    "device": Device.cpu,
    "data.split_seed": 1,
    "data.context": 16,
    "model.widths": [8],
    "model.width": 16,
    "optimizer.lr": 0.123,
    "engine.every": 2,
    "hardware.threads": 3,
    "evaluation.count": 3,
    "train.batch_size": 64,
    "train.epochs": 3.5,
    "train.warmup_examples": 2048,
    "train.decay": Decay.linear,
    "train.max_norm": 1.0,
    "train.log_every_examples": 7,
    "train.checkpoint_every_examples": 7,
}


def has(config: Config, key: str) -> bool:
    group, _, name = key.rpartition(".")
    return hasattr(getattr(config, group) if group else config, name)


def changed(config: Config, key: str) -> Config:
    group, _, name = key.rpartition(".")
    if not group:
        return dataclasses.replace(config, **{name: OTHER[key]})
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: OTHER[key]})})


def planned(config: Config) -> set[Path] | str:
    """The jobs' directories, or why there are none."""
    assert config.study is not None
    try:
        return {job.directory for job in laboratory.load(config.study).jobs(config, [])}
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_reads_what_it_says(name: str) -> None:
    config = read("demo" if name == "batch_size_invariance" else f"short/{name}").config
    assert config.study is not None
    config = dataclasses.replace(
        config, directory="nowhere", study=dataclasses.replace(config.study, seeds=config.study.seeds[:1])
    )
    reads = laboratory.load(config.study).reads
    known = {key for key in OTHER if has(config, key)}  # texts have others than pictures
    own = {key for key in known if key in reads or key.partition(".")[0] in reads}
    plan = planned(config)
    assert [key for key in sorted(own) if planned(changed(config, key)) == plan] == []
    for key in known - own:
        config = changed(config, key)
    assert planned(config) == plan


def test_every_key_that_decides_a_run_is_looked_at() -> None:
    config = compose_config([])
    train = {f"train.{field.name}" for field in dataclasses.fields(config.train)}
    groups = {"data", "model", "optimizer", "engine", "hardware", "evaluation", "seed", "device"}
    assert train <= OTHER.keys() and groups == {key.partition(".")[0] for key in OTHER} - {"train"}
