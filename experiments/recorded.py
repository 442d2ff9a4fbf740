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

UNKNOWN = "not run yet"

Form = Literal["full", "short"]


@dataclass(frozen=True)
class Recorded:
    """What a study found, in which of its forms, over how many seeds. `short_seconds` is the processor time of all jobs
    of the short form, which is kept beside the findings of the full one; it may be that of an earlier configuration."""

    form: Form
    seeds: int
    summary: Summary
    short_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """On CORES cores, each of which always has a job of one thread."""
        return self.summary.seconds / CORES

    def seconds_of(self, form: Form) -> float | None:
        """The same of one form, None where it is not known."""
        if form == self.form:
            return self.seconds
        return self.short_seconds / CORES if form == "short" and self.short_seconds is not None else None

    def save(self, name: str, figure: Path | None = None) -> None:
        """With its figure, unless that is there already."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        with atomic_write(FOLDER / f"{name}.json") as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())
        if figure is not None:
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
    full = held(experiment, "full")
    short = None if experiment.short is None else held(experiment.short, "short")
    if full is None or short is None:
        return full or short
    return replace(full, short_seconds=short.summary.seconds)


def held(one: Experiment, form: Form) -> Recorded | None:
    """What the directory of one form holds."""
    if not (one.directory / OUTCOME).exists():
        return None
    description, summary = Description.load(one.directory), Summary.load(one.directory)
    # A study that runs again with other settings has described itself, and not yet found anything.
    current = description.command == summary.command and len(description.jobs) == summary.jobs
    if not current or deciding(description.config, one.config) != deciding(as_dict(one.config), one.config):
        return None
    summary = replace(summary, command=essential(summary.command))
    return Recorded(form, len(description.config["study"]["seeds"]), summary)


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


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
