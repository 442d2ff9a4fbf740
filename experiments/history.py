"""What a run logs, kept beside its record whatever the tracker: its configuration, its machine, and its scalars.

history.jsonl has one line a logging point, {"examples_seen": 256, "loss/train": 2.03, ...}. Histograms are left to W&B.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from experiments.atomic import atomic_write
from experiments.benchmarks.machine import machine
from experiments.errors import UserError
from experiments.fingerprint import as_dict
from experiments.schemas.run import Config
from experiments.tracker import AXIS, Histogram, Value

FILE = "history.jsonl"
CONFIG = "config.json"
MACHINE = "machine.json"

# What a curve can show; all of a float64 would double the file, and final values are in the record.
DIGITS = 6


class NoHistory:
    """Keeps nothing: of the processes that share a run, the first has its history."""

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        pass

    def flush(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        pass


class History(NoHistory):
    """Appends to the files of a run in a directory, after what they hold up to `position` examples.

    A resumed run takes up its checkpoint's position, so whatever the run before it logged later is dropped; at
    position 0 the run begins, and all is. To be used in a `with`.
    """

    def __init__(self, config: Config, directory: Path, device: torch.device, position: int) -> None:
        for name, content in ((CONFIG, as_dict(config)), (MACHINE, machine(config.hardware.threads, device.type))):
            with atomic_write(directory / name) as file:
                file.write((json.dumps(content, indent=1) + "\n").encode())
        path = directory / FILE
        if position:
            kept = [line for line in load(directory) if line[AXIS] <= position]
            with atomic_write(path) as file:
                file.writelines(_line(values).encode() for values in kept)
        # A line at a time: a page made while the run goes on shows all of it.
        self._file = path.open("a" if position else "w", buffering=1, encoding="utf-8")

    def log(self, examples_seen: int, values: Mapping[str, Value]) -> None:
        scalars = {name: value for name, value in values.items() if not isinstance(value, Histogram)}
        self._file.write(_line({AXIS: examples_seen, **scalars}))

    def flush(self) -> None:
        """Before a checkpoint: what is logged up to its position is then on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


def load(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's history, none if it has no such file. A last line that was cut off is left out."""
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{path} is not the history of a run ({error}): delete it, the run's record stays") from error


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({name: _rounded(value) for name, value in values.items()}, separators=(",", ":")) + "\n"


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value
