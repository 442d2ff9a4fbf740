"""The experiments of conf/experiment/: what each asks, its short form, and what is known of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from experiments.config import CONF, compose_config
from experiments.errors import UserError
from experiments.laboratory.schemas import STUDIES
from experiments.schemas.run import Config

FOLDER = CONF / "experiment"
SHORT = "short/"


@dataclass(frozen=True)
class Experiment:
    """name: of its file, below conf/experiment/; purpose: the first line of its header."""

    name: str
    config: Config
    purpose: str
    short: Experiment | None = None

    @property
    def directory(self) -> Path:
        """Where its results lie, or those of its single runs."""
        # A single run has a new directory at every start, below the experiment's.
        return Path(self.config.directory if self.config.study else f"outputs/{self.config.name}")

    @property
    def arguments(self) -> list[str]:
        """Of Python."""
        return ["-m", "experiments.train", f"experiment={self.name}"]

    def question(self) -> str:
        """Of its study; what is no study says what it is for."""
        if self.config.study is None:
            return self.purpose
        question: str = import_module(f"experiments.laboratory.{self.config.study.name}").STUDY.question
        return question


def names() -> list[str]:
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


@cache
def catalogue() -> tuple[Experiment, ...]:
    """The studies in the order of their table, and then the rest. A short form is a part of the experiment it is of."""
    files = {name: read(name) for name in names()}
    shorts: dict[str, Experiment] = {}
    for name, experiment in files.items():
        if (whole := whole_of(name, experiment.config)) in files:
            shorts.setdefault(whole, experiment)
    order = list(STUDIES)
    short_names = {short.name for short in shorts.values()}
    found = [dataclasses.replace(e, short=shorts.get(name)) for name, e in files.items() if name not in short_names]
    return tuple(
        sorted(found, key=lambda e: (order.index(e.config.study.name) if e.config.study else len(order), e.name))
    )


def read(name: str) -> Experiment:
    """Raises UserError if its file cannot be composed."""
    header = re.match(r"(# @package _global_\n)?((?:#.*\n)*)", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert header is not None
    lines = (line.lstrip("# ").rstrip() for line in header[2].splitlines())
    purpose = next((line for line in lines if line), "")
    try:
        return Experiment(name, compose_config([f"experiment={name}"]), purpose)
    except HydraException as error:
        raise UserError(f"conf/experiment/{name}.yaml cannot be composed: {error}") from error


def whole_of(name: str, config: Config) -> str:
    """The experiment of which this is a short form: it lies in short/, or else says so in its note."""
    if name.startswith(SHORT):
        return name.removeprefix(SHORT)
    if config.study is None or not config.study.note:
        return ""
    file = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert isinstance(file, DictConfig)
    return next((entry for entry in file.get("defaults", []) if isinstance(entry, str) and entry != "_self_"), "")


def chosen(wanted: Sequence[str]) -> list[Experiment]:
    """The studies with these names, by default all. Raises UserError for another name."""
    studies = {experiment.name: experiment for experiment in catalogue() if experiment.config.study}
    if unknown := [name for name in wanted if name not in studies]:
        raise UserError(f"{', '.join(unknown)}: no study of conf/experiment; there are {', '.join(studies)}")
    return [experiment for name, experiment in studies.items() if not wanted or name in wanted]
