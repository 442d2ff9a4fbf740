"""The state of a run in one file, written atomically, the one before it kept."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from experiments.atomic import atomic_write
from experiments.errors import UserError

FILE = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Write the state; a process killed at any moment leaves this checkpoint or the previous one whole.

    Raises OSError if it cannot be written, as on a full disk; the one before it then stays what it is.
    """
    path = directory / FILE
    for left in directory.glob(f".{FILE}.*"):  # by a process that was killed: one at a time writes here
        left.unlink(missing_ok=True)
    with atomic_write(path, previous=directory / PREVIOUS) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Of its own zip writer, over what the file refused.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return path


def find(directory: Path) -> Path | None:
    """The newest checkpoint, or None. Only a kill between the two renames leaves the previous one alone."""
    return next((path for path in (directory / FILE, directory / PREVIOUS) if path.exists()), None)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Raises UserError if the file is damaged; it is left where it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything, and its cause does not change the way out
        previous = path.with_name(PREVIOUS)
        way_out = f"delete {path} to start from the beginning"
        if path.name == FILE and previous.exists():
            way_out = f"to continue from the one before it, move {previous} to {path}; or delete both to start anew"
        raise UserError(f"the checkpoint {path} is damaged ({error}): {way_out}") from error
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators on the CPU and, if the run uses it, on the GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
