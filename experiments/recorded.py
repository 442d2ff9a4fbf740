"""What is kept of a study in docs/results/, so that a document can quote it where the runs are not at hand."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments.atomic import atomic_write
from experiments.catalogue import Experiment
from experiments.description import OUTCOME, Description, Summary
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.fingerprint import NOT_IN_FINGERPRINT, as_dict, without_defaults
from experiments.schemas.run import Config

FOLDER = Path("docs/results")
FIGURE = "figure.png"  # as a study's directory has it

# What results are measured on; the machines of users and of CI have as many cores.
CORES = 2

# Overrides that decide no number: where and how a study ran, not what.
ELSEWHERE = {"study.workers", "study.runs", "hydra.run.dir"}

Form = Literal["full", "short"]


@dataclass(frozen=True)
class Recorded:
    """What a study found, in which of its forms, over how many seeds."""

    form: Form
    seeds: int
    summary: Summary

    @property
    def seconds(self) -> float:
        """On CORES cores, each of which always has a job of one thread."""
        return self.summary.seconds / CORES

    def save(self, name: str, figure: Path) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with atomic_write(FOLDER / f"{name}.json") as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())
        shutil.copyfile(figure, FOLDER / f"{name}.png")


def recorded(name: str) -> Recorded | None:
    """As `save` left it, if it did. Raises UserError if the file is damaged."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        summary = values["summary"]
        findings = [Finding(**finding) for finding in summary["findings"]]
        return Recorded(**values | {"summary": Summary(**summary | {"findings": findings})})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and make results again") from error


def finished(experiment: Experiment) -> Recorded | None:
    """What its own directory holds, the short form's where the full one has not come to its end."""
    forms: list[tuple[Form, Experiment | None]] = [("full", experiment), ("short", experiment.short)]
    for form, one in forms:
        if one is not None and (one.directory / OUTCOME).exists():
            description, summary = Description.load(one.directory), Summary.load(one.directory)
            # A study that runs again with other settings has described itself, and not yet found anything.
            current = description.command == summary.command and len(description.jobs) == summary.jobs
            if current and deciding(description.config, one.config) == deciding(as_dict(one.config), one.config):
                summary = replace(summary, command=essential(summary.command))
                return Recorded(form, len(description.config["study"]["seeds"]), summary)
    return None


def deciding(config: dict[str, Any], like: Config) -> dict[str, Any]:
    """What of a study's configuration decides its findings: overrides on the command line make another experiment.
    `like` has the schema's defaults, which results from before there was such an option have."""
    kept = {key: value for key, value in config.items() if not elsewhere(key)}
    study = {key: value for key, value in config["study"].items() if not elsewhere(f"study.{key}")}
    return without_defaults(kept | {"study": study}, like)


def essential(command: str) -> str:
    """Without overrides that decide no number."""
    words = shlex.split(command)
    return shlex.join(word for word in words if "=" not in word or not elsewhere(word.partition("=")[0]))


def elsewhere(key: str) -> bool:
    return key in ELSEWHERE or key.partition(".")[0] in NOT_IN_FINGERPRINT


def figure_of(experiment: Experiment, form: Form) -> Path:
    one = experiment.short if form == "short" and experiment.short is not None else experiment
    return one.directory / FIGURE


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
