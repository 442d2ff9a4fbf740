"""What a directory already holds of a run, and how the run continues from it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from experiments import checkpoint, record
from experiments.distributed import Process
from experiments.errors import UserError
from experiments.fingerprint import fingerprint, first_difference, identity
from experiments.record import Record
from experiments.schemas.run import Config


def previous_run(config: Config, directory: Path) -> Record | None:
    """The record of this very run if it is finished. Raises UserError if the directory holds anything to lose."""
    path = directory / record.FILE
    latest = checkpoint.find(directory)
    if not config.resume:
        if path.exists() or latest is not None:
            raise UserError(
                f"{directory} holds a run already: add resume=true to continue it, or give another directory="
            )
        return None
    if not path.exists():
        return None
    previous = Record.load(path)
    if previous.fingerprint == fingerprint(config):
        return previous if previous.status == "finished" else None
    if latest is None:
        raise UserError(f"{path} is of a run with another configuration: give another directory=, or delete it")
    return None  # the checkpoint knows in what the configurations differ


def restore(
    config: Config, directory: Path, parts: dict[str, Any], device: torch.device, process: Process
) -> tuple[Record, str | None]:
    """Loads the checkpoint into the parts; the record so far and the tracker's run id, fresh ones without it."""
    path = process.decide(checkpoint.find, directory)
    if path is None:
        method = config.optimizer
        seed, B = config.seed, config.train.batch_size
        fresh = Record(method.name, method.label, method.lr, B, seed, fingerprint(config), processor_seconds=0.0)
        return fresh, None
    state = checkpoint.load(path, device)
    if (difference := first_difference(state["identity"], identity(config))) is not None:
        raise UserError(
            f"the checkpoint {path} is of a run with another configuration: {difference}. "
            "Go back to that value, or give another directory="
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    checkpoint.restore_random_state(state["random"], device)
    result = Record(**state["record"])
    if process.first:
        print(f"continuing from {path} at {state['sampler']['position']:,} examples", file=sys.stderr)
    return result, state["run_id"]


def save(
    config: Config, directory: Path, parts: dict[str, Any], device: torch.device, result: Record, run_id: str | None
) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"identity": identity(config), "random": checkpoint.random_state(device)}
    state |= {"record": dataclasses.asdict(result), "run_id": run_id}
    checkpoint.save(directory, state)
