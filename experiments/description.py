"""What a study's directory says about it beside its results: study.json before, outcome.json after."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments import laboratory
from experiments.atomic import atomic_write
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Coordinate, Job
from experiments.laboratory.schemas import STUDIES
from experiments.study import Study

FILE = "study.json"
OUTCOME = "outcome.json"
PACKAGES = ("gradstats", "torch", "numpy", "hydra-core", "wandb")


@dataclass
class Place:
    """Of a job: its directory, relative to the study's, and its coordinates."""

    directory: str
    coordinates: dict[str, Coordinate]


@dataclass
class Description:
    """What the results themselves do not say: which belong to the study, and what they were made with."""

    config: dict[str, Any]
    jobs: list[Place]
    command: str
    environment: dict[str, str]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / FILE) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> Description:
        try:
            text = json.loads((directory / FILE).read_text())
            return cls(**text | {"jobs": [Place(**place) for place in text["jobs"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{directory} is not the directory of a study ({error}): name one that holds {FILE}"
            ) from error

    def study(self) -> Study[Any]:
        settings = self.config["study"]
        return laboratory.load(STUDIES[settings["name"]](**settings))


def places(jobs: list[Job], directory: Path) -> list[Place]:
    return [Place(os.path.relpath(job.directory, directory), job.coordinates) for job in jobs]


@dataclass
class Summary:
    """What a document quotes of a study: seconds are those of all its jobs together, of processor time where it was
    counted."""

    title: str
    question: str
    source: str
    command: str
    note: str
    jobs: int
    seconds: float
    environment: dict[str, str]
    caption: str
    alternative: str
    findings: list[Finding]

    def save(self, directory: Path) -> None:
        with atomic_write(directory / OUTCOME) as file:
            file.write(json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> Summary:
        try:
            text = json.loads((directory / OUTCOME).read_text())
            return cls(**text | {"findings": [Finding(**finding) for finding in text["findings"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{directory} holds no finished study ({error}): run it first") from error


def environment(threads: int) -> dict[str, str]:
    """What the numbers may depend on besides the configuration."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads per run": str(threads),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
