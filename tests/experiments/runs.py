"""What is compared of two runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from experiments import checkpoint
from experiments.record import Record

METHODS = ["adam", "sgd_linear", "batch_invariant_adam"]


def numbers(result: Record) -> dict[str, object]:
    return dataclasses.asdict(dataclasses.replace(result, seconds=0.0))


def parameters(directory: Path) -> torch.Tensor:
    state = checkpoint.load(directory / checkpoint.FILE, torch.device("cpu"))
    return torch.cat([p.flatten() for p in state["model"].values()])
