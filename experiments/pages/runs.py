"""The runs that lie under some paths, as training left them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from experiments import history, record
from experiments.errors import UserError
from experiments.fingerprint import flatten
from experiments.record import Record
from experiments.tracker import AXIS

NOT_RUNS = ("wandb", ".hydra")  # what a run's own tools keep beside it

Status = Literal["finished", "diverged", "unfinished"]


@dataclass(frozen=True)
class Run:
    """config: its values by their dotted keys; record: None until it has ended; series: examples seen -> value."""

    directory: Path
    config: dict[str, Any]
    record: Record | None
    series: dict[str, dict[int, float]]
    machine: dict[str, Any]

    @property
    def status(self) -> Status:
        ended = self.record is not None and self.record.status
        return "unfinished" if not ended or ended == "running" else ended

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @cached_property
    def reach(self) -> int:
        """The last number of examples that it tells anything of."""
        return max((max(values) for values in self.series.values() if values), default=0)

    def final(self, metric: str) -> float:
        """Its last value; of a run that diverged its first, as studies count it; nan while it is unfinished."""
        values = self.series.get(metric)
        if not values or self.status == "unfinished":
            return float("nan")
        return values[(min if self.status == "diverged" else max)(values)]


def collect(paths: Sequence[Path]) -> list[Run]:
    """Every run under the paths, at any depth, each once. Raises UserError for a path that holds none."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no directory: name that of a run, a sweep or a study, as outputs/demo")
        directories = list(_run_directories(path))
        if not directories:
            raise UserError(
                f"{path} holds no runs: they are where {record.FILE} or {history.FILE} is, which "
                "python -m experiments.train writes"
            )
        found |= {directory.resolve(): directory for directory in directories}
    return [_read(directory) for directory in found.values()]


def _run_directories(path: Path) -> Iterator[Path]:
    for directory, below, files in os.walk(path):
        below[:] = sorted(name for name in below if name not in NOT_RUNS)
        if record.FILE in files or history.FILE in files:
            yield Path(directory)


def _read(directory: Path) -> Run:
    path = directory / record.FILE
    result = Record.load(path) if path.exists() else None
    lines = history.load(directory)
    series: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != AXIS and isinstance(value, int | float):
                series.setdefault(name, {})[line[AXIS]] = float(value)
    config = _json(directory / history.CONFIG)
    if result is not None:
        # The record's values are exact, and runs from before there was a history have nothing else.
        for name, values in (
            ("loss/train", result.train_loss),
            ("loss/test", result.test_loss),
            ("accuracy/test", result.test_accuracy),
        ):
            series.setdefault(name, {}).update(zip(result.examples, values, strict=True))
        config = config or {
            "seed": result.seed,
            "optimizer": {"name": result.method, "label": result.label, "lr": result.lr},
            "train": {"batch_size": result.batch_size},
        }
    return Run(directory, dict(flatten(config)), result, series, _json(directory / history.MACHINE))


def _json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, the run's record stays") from error
    return content
