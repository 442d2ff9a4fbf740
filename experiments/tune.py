"""Tunes at a small batch size, and prints what to use at the largest batch that fits, with what that costs.

python -m experiments.tune experiment=digits
python -m experiments.tune model=convnet data=npz data.path=mine.npz tune.batch_size=32 tune.memory_gb=8

The learning rate of batch-size-invariant Adam (if asked for, also R and the horizons: tune.reference_batch_sizes,
tune.horizons) is tuned at tune.batch_size, on the training loss; conf/tune.yaml has all settings and their reasons.
Runs are ordinary ones, in runs/ of the directory; the same command goes on with what was interrupted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from experiments.atomic import atomic_write
from experiments.capacity import GIGABYTE, free_memory, largest_batch, step_memory
from experiments.config import CONF, as_config
from experiments.data import load_data
from experiments.description import environment
from experiments.distributed import refuse_processes, this_process
from experiments.documents import Table, markdown
from experiments.errors import UserError, check_distinct, command_line
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import Config, TuneConfig
from experiments.train import prepare
from experiments.tune_report import capacity_told, regret, settings, tuning_told
from experiments.tuning import Tuner

FILE = "tuned.md"
LEAST_STEPS = 16  # in fewer of them Adam learns little, however it is tuned


def run_tune(config: Config, directory: Path, overrides: Sequence[str]) -> None:
    """Prints the settings and what they cost, and writes them to the directory.

    overrides: those that the configuration was composed with.
    """
    refuse_processes("tuning")
    console = Console()
    tune = check(config)
    device = prepare(config)
    data = load_data(config.data, device)
    candidates = candidates_of(config, tune)
    # Above the batch size, R takes a buffer more.
    largest_R = max(candidates, key=lambda optimizer: optimizer.reference_batch_size or tune.batch_size)
    memory = partial(step_memory, dataclasses.replace(config, optimizer=largest_R), data, device)
    budget = free_memory(device) if tune.memory_gb is None else tune.memory_gb * GIGABYTE
    capacity = largest_batch(memory, tune.batch_size, len(data.train), budget)
    fars, untold = measured_at(tune, capacity.batch_size, config.train.epochs * len(data.train))

    tracker = dataclasses.replace(config.tracker, group=config.tracker.group or f"{config.name} tune")
    # Runs of all batch sizes end at the same count of examples.
    multiple = math.lcm(config.evaluation.multiple, tune.batch_size, *fars)
    evaluation = dataclasses.replace(config.evaluation, multiple=multiple)
    tuner = Tuner(dataclasses.replace(config, tracker=tracker, evaluation=evaluation), tune, directory, console)
    tuned = tuner.refine(tuner.look(candidates, tune.batch_size), tune.batch_size)
    parts: list[str | Table] = [tuning_told(tuned, tuner), capacity_told(capacity, device)]
    parts += settings(tuned.optimizer, capacity.batch_size, config.evaluation.multiple, overrides)
    for far in fars:
        parts += regret(tuned.optimizer, far, tuner)
    parts += untold
    told = ", ".join(f"{key} {value}" for key, value in environment(config.hardware.threads).items())
    tell([*parts, f"Measured with: {told}."], directory, console)


def measured_at(tune: TuneConfig, largest: int, examples: float) -> tuple[list[int], list[str]]:
    """The batch sizes at which regret is measured, and what is said of the largest that fits where it is none of them.

    examples: the budget of a run.
    """
    home = tune.batch_size
    fars = sorted({min(tune.factor * home, largest), largest} - {home})
    if not fars:
        return [], [f"What the tuning costs at larger batches is not known: none above {home} fits."]
    steps = int(examples / largest)
    if steps >= LEAST_STEPS:
        return fars, []
    return fars[:-1], [
        f"Regret at B = {largest} was not measured: a run has {steps} steps there, too few to learn what could be "
        "compared. Train for longer (train.epochs)."
    ]


def check(config: Config) -> TuneConfig:
    """Raises UserError for settings that do not fit each other."""
    tune, optimizer = config.tune, config.optimizer
    assert tune is not None
    if not isinstance(optimizer, BatchInvariantAdamConfig):
        raise UserError(f"optimizer={optimizer.name}: what is tuned is optimizer=batch_invariant_adam")
    for key in ("reference_batch_sizes", "horizons", "seeds"):
        check_distinct(f"tune.{key}", getattr(tune, key))
    if len(tune.seeds) < 2:
        raise UserError(f"tune.seeds={tune.seeds}: an interval needs two seeds or more")
    if not 0 < tune.share <= 1:
        raise UserError(f"tune.share={tune.share} is a share of the budget: give a number above 0, and 1 at most")
    for key in ("batch_size", "factor", "memory_gb"):
        if (value := getattr(tune, key)) is not None and value <= 0:
            raise UserError(f"tune.{key}={value} must be positive")
    shortest = 1 - min(optimizer.betas)
    if min(tune.horizons) < shortest or shortest <= 0:
        raise UserError(
            f"tune.horizons={tune.horizons}: with optimizer.betas={list(optimizer.betas)} each must be {shortest:g} or "
            "more, since an average remembers no less than one batch"
        )
    return tune


def candidates_of(config: Config, tune: TuneConfig) -> list[BatchInvariantAdamConfig]:
    """Every R with every horizon; lr is tuned for each."""
    optimizer = config.optimizer
    assert isinstance(optimizer, BatchInvariantAdamConfig)
    first, second = optimizer.betas
    return [
        dataclasses.replace(
            optimizer,
            batch_size=tune.batch_size,
            betas=(1 - (1 - first) / horizon, 1 - (1 - second) / horizon),
            reference_batch_size=R,
        )
        for R in tune.reference_batch_sizes
        for horizon in tune.horizons
    ]


def tell(parts: Sequence[str | Table], directory: Path, console: Console) -> None:
    """To the terminal and to a document in the directory."""
    for part in parts:
        console.print()
        if isinstance(part, Table):
            console.print(part.explanation, part.rich(), sep="\n\n", markup=False, highlight=False)
        else:
            console.print(part, markup=False, highlight=False, soft_wrap=True)
    written = "\n\n".join(markdown(part) if isinstance(part, Table) else part for part in parts)
    with atomic_write(directory / FILE) as file:
        file.write(f"{written}\n".encode())
    console.print(f"\nwritten: {directory / FILE}", soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="tune")
def main(composed: DictConfig) -> None:
    interrupted = "interrupted: what is finished is kept, and the same command continues"
    with command_line(interrupted), this_process().one_message():
        job = HydraConfig.get()
        run_tune(as_config(composed), Path(job.runtime.output_dir), job.overrides.task)


if __name__ == "__main__":
    main()
