"""What is compared of two runs, and what compiling one warns of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experiments import checkpoint
from experiments.record import Record

# Dynamo makes an instance of a Function where it traces one, and reads .grad of what a graph takes from another;
# Inductor, when it is imported, uses what torch deprecates.
COMPILES = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
)

METHODS = ["adam", "sgd_linear", "batch_invariant_adam"]


def numbers(result: Record) -> dict[str, object]:
    return dataclasses.asdict(dataclasses.replace(result, seconds=0.0, processor_seconds=0.0))


def parameters(directory: Path) -> torch.Tensor:
    state = checkpoint.load(directory / checkpoint.FILE, torch.device("cpu"))
    return torch.cat([p.flatten() for p in state["model"].values()])
