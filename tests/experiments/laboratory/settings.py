"""The smallest study of batch-size invariance, and its jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments import laboratory
from experiments.jobs import Job
from experiments.laboratory.schemas import BatchSizeInvarianceConfig
from experiments.schemas.run import Config

INVARIANCE = BatchSizeInvarianceConfig(
    name="batch_size_invariance",
    ours=["batch_invariant_adam"],
    baselines=["adam", "sgd_linear"],
    reference="adam",
    tuning_batch_size=16,
    lr_multipliers=[0.5, 1.0],
    batch_sizes=[16, 64],
    score_batch_sizes=[16, 64],
    seeds=[0],
    workers=1,
)


def planned(config: Config, directory: Path) -> list[Job]:
    assert config.study is not None
    return laboratory.load(config.study).jobs(dataclasses.replace(config, directory=str(directory)), [])
