"""What a study computes: training runs and measurements, each in a directory of its own, where it is found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from rich.console import Console

from experiments import record
from experiments.atomic import atomic_write
from experiments.errors import Diverged, UserError
from experiments.fingerprint import fingerprint
from experiments.progress import Notify, note, progress_line
from experiments.record import Record
from experiments.schemas.run import Config
from experiments.train import train

FILE = "measurement.json"

Coordinate = str | float | int | bool | None


@dataclass(frozen=True)
class Job(ABC):
    """coordinates: where the result stands among those of the study; cost: its time, relative to other jobs'."""

    directory: Path
    coordinates: dict[str, Coordinate]
    cost: float

    @abstractmethod
    def is_finished(self) -> bool: ...

    @abstractmethod
    def run(self, notify: Notify) -> None:
        """In a process of its own."""

    def title(self) -> str:
        """As the progress line shows it."""
        return " ".join(f"{key}={value}" for key, value in self.coordinates.items())


@dataclass(frozen=True)
class Training(Job):
    """A run of experiments.train; its result is a Record. One that diverged is finished, and gets no other try."""

    config: Config

    def is_finished(self) -> bool:
        return (self.directory / record.FILE).exists()

    def run(self, notify: Notify) -> None:
        try:
            train(self.config, self.directory, notify)
        except Diverged:
            notify(1, 1, float("nan"))


@dataclass(frozen=True)
class Measurement(Job):
    """function(**coordinates), which must be importable, as any JSON; its result is what the function returns.

    The coordinates are all that may decide it: they name the directory.
    """

    function: Callable[..., Any]

    def is_finished(self) -> bool:
        return (self.directory / FILE).exists()

    def run(self, notify: Notify) -> None:
        torch.set_num_threads(1)
        started, worked = time.perf_counter(), time.process_time()
        found = self.function(**self.coordinates)
        times = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - worked}
        self.directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.directory / FILE) as file:
            file.write(json.dumps({"found": found} | times).encode())
        notify(1, 1, float("nan"))


@dataclass(frozen=True)
class Result:
    """found: a Record, or what a measured function returned."""

    coordinates: dict[str, Coordinate]
    found: Any
    seconds: float
    processor_seconds: float | None = None  # None of results from before they were counted

    @property
    def core_seconds(self) -> float:
        """What it takes on a machine that does nothing else, as far as that is known."""
        return self.seconds if self.processor_seconds is None else self.processor_seconds


def training(root: Path, config: Config, **coordinates: Coordinate) -> Training:
    """A run with this configuration, in a directory below root; equal configurations share it."""
    optimizer, B = config.optimizer, config.train.batch_size
    name = f"{optimizer.name}-B{B}-lr{optimizer.lr:g}-seed{config.seed}"
    run = dataclasses.replace(config, name=name, study=None, resume=True)
    # The fingerprint keeps runs of other configurations apart.
    directory = root / f"{name}-{fingerprint(run)[:8]}"
    # Steps, and what each example costs at any batch size.
    cost = run.train.epochs * (1 / B + 1 / 64)
    return Training(directory, coordinates, cost, dataclasses.replace(run, directory=str(directory)))


def measurement(root: Path, function: Callable[..., Any], cost: float = 1.0, **coordinates: Coordinate) -> Measurement:
    """A call of the function with these arguments, in a directory below root."""
    text = json.dumps([function.__qualname__, coordinates], sort_keys=True)
    directory = root / f"{function.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Measurement(directory, coordinates, cost, function)


def load(directory: Path, coordinates: dict[str, Coordinate]) -> Result:
    """Raises UserError if the job has no result there, or a damaged one."""
    if not (directory / FILE).exists():
        found = Record.load(directory / record.FILE)
        return Result(coordinates, found, found.seconds, found.processor_seconds)
    try:
        return Result(coordinates, **json.loads((directory / FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory / FILE} is damaged ({error}): delete it to measure again") from error


def run_jobs(jobs: Sequence[Job], workers: int | None, console: Console) -> None:
    """All that have no result yet, the longest first, one process a core."""
    unfinished = {job.directory: job for job in jobs if not job.is_finished()}
    todo = sorted(unfinished.values(), key=lambda job: job.cost, reverse=True)
    before = len({job.directory for job in jobs}) - len(todo)
    console.print(f"{before + len(todo)} jobs, {before} of them finished before", soft_wrap=True)
    if not todo:
        return
    processes = joblib.Parallel(workers or joblib.cpu_count(), batch_size=1, return_as="generator_unordered")
    with progress_line([job.title() for job in todo], [job.cost for job in todo], before, console) as board:
        for _ in processes(joblib.delayed(run_one)(board, i, job) for i, job in enumerate(todo)):
            pass


def run_one(board: Path, index: int, job: Job) -> None:
    """In a worker process: run, and note how far it is."""
    job.run(lambda examples, total, loss: note(board, index, examples, total, loss))
