"""Every file of conf/experiment/ composes, and takes two steps of what it would run.

Of a study that is the first job of every method, and the cheapest call of every function that it measures; a study
whose jobs depend on results is followed as far as they are planned without any. A short form runs what it measures, and
one job; its full form, which plans the same functions with more of everything, runs every method.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import laboratory
from experiments.catalogue import catalogue
from experiments.config import compose_config
from experiments.data import load_data
from experiments.jobs import Job, Measurement, Training
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.search import run_search
from experiments.train import train
from tests.experiments.test_gpu_experiments import SIZES

EXPERIMENTS = {e.name: e for e in catalogue()} | {e.short.name: e.short for e in catalogue() if e.short}
STUDIES = [name for name, e in EXPERIMENTS.items() if e.config.study]
FULL = [name for name in STUDIES if EXPERIMENTS[name].short]
RUNS = [name for name, e in EXPERIMENTS.items() if not e.config.study]
ENOUGH = 32  # sequences of text on which a loss is evaluated


@cache
def examples(data: str) -> int:
    """Of the training set of a configuration's data, as JSON."""
    config = next(e.config.data for e in EXPERIMENTS.values() if as_text(e.config) == data)
    return len(load_data(config, torch.device("cpu")).train)


def as_text(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config.data), default=str, sort_keys=True)


def two_steps(config: Config, size: int) -> Config:
    """The configuration, but for how long it trains and how much it evaluates; size: of its training set."""
    B = config.train.batch_size
    data = config.data
    if hasattr(data, "evaluated"):
        data = dataclasses.replace(data, evaluated=ENOUGH)  # type: ignore[call-arg]
    return dataclasses.replace(
        config,
        data=data,
        tracker=dataclasses.replace(config.tracker, name="none"),
        train=dataclasses.replace(
            config.train, epochs=(2 * B + 0.5) / size, warmup_examples=min(B, config.train.warmup_examples)
        ),
        evaluation=dataclasses.replace(config.evaluation, count=1, multiple=2 * B),
    )


def trained(config: Config, directory: Path, size: int) -> None:
    result = train(two_steps(config, size), directory)
    assert result.status == "finished" and result.examples == [0, 2 * config.train.batch_size]


@cache
def planned(name: str) -> Sequence[Job]:
    """In directories that nothing is written to."""
    config = dataclasses.replace(EXPERIMENTS[name].config, directory="nowhere")
    assert config.study is not None
    jobs = laboratory.load(config.study).jobs(config, [])
    assert jobs
    return jobs


def methods(jobs: Sequence[Job]) -> dict[str, Training]:
    """The first run of each."""
    runs = [job for job in jobs if isinstance(job, Training)]
    return {job.config.optimizer.name: job for job in reversed(runs)}


def functions(jobs: Sequence[Job]) -> dict[str, Measurement]:
    """The cheapest call of each."""
    calls = [job for job in jobs if isinstance(job, Measurement)]
    calls.sort(key=lambda job: job.cost, reverse=True)
    return {job.function.__qualname__: job for job in calls}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_two_steps(name: str, tmp_path: Path) -> None:
    runs, calls = list(methods(planned(name)).values()), list(functions(planned(name)).values())
    if name in FULL:
        calls = []
    else:
        runs = runs[:1]
    for i, call in enumerate(calls):
        here = dataclasses.replace(call, directory=tmp_path / f"call {i}")
        here.run(lambda seen, total, loss: None)
        assert here.is_finished()
    for i, run in enumerate(runs):
        trained(run.config, tmp_path / f"run {i}", examples(as_text(EXPERIMENTS[name].config)))


@pytest.mark.parametrize("name", FULL)
def test_what_a_full_form_measures_its_short_form_measures_too(name: str) -> None:
    short = EXPERIMENTS[name].short
    assert short is not None and short.directory != EXPERIMENTS[name].directory
    assert functions(planned(name)).keys() == functions(planned(short.name)).keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_two_steps(name: str, tmp_path: Path) -> None:
    more: list[str] = []
    if name in SIZES:
        y = np.arange(160) % 4
        x = np.random.default_rng(0).integers(0, 255, (160, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        (np.arange(4096) % 7).astype(np.uint16).tofile(tmp_path / "tokens.bin")
        file = {"gpu_resnet_cifar": "images.npz", "gpu_gpt2": "tokens.bin"}[name]
        more = [*SIZES[name], f"data.path={tmp_path / file}", "device=cpu", "hardware.compile=false"]
    config = compose_config([f"experiment={name}", *more])
    size = len(load_data(config.data, torch.device("cpu")).train)
    if config.search is None:
        trained(config, tmp_path / "run", size)
    else:
        search = dataclasses.replace(config.search, trials=1, seeds=config.search.seeds[:1])
        # A trial is composed again, from overrides.
        steps = two_steps(config, size)
        overrides = [
            *(f"experiment={name}", f"train.epochs={steps.train.epochs}", "tracker=none", "evaluation.count=1"),
            *(
                f"evaluation.multiple={steps.evaluation.multiple}",
                "search.space={optimizer.lr: {low: 0.01, high: 0.1}}",
            ),
        ]
        run_search(dataclasses.replace(steps, search=search), tmp_path / "search", overrides)
        (found,) = (Record.load(path) for path in (tmp_path / "search").glob("runs/*/record.json"))
        assert found.examples == [0, 2 * config.train.batch_size]
