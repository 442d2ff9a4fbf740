"""What a study is: a question, the jobs that answer it, and what their results say."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from hydra.errors import MissingConfigException
from matplotlib.figure import Figure

from experiments.config import compose_config
from experiments.documents import Table
from experiments.errors import UserError, check_distinct
from experiments.estimate import Finding
from experiments.jobs import Coordinate, Job, Measurement, Result, Training, measurement, training
from experiments.laboratory.schemas import StudyConfig
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config
from experiments.themes import LIGHT, Theme, image

Settings = TypeVar("Settings", bound=StudyConfig)

# What a study of training runs reads, whose settings say the optimizers, batch sizes and seeds.
OF_RUNS = (
    "data",
    "model",
    "engine",
    "hardware",
    "device",
    "evaluation",
    "train.epochs",
    "train.warmup_examples",
    "train.decay",
    "train.max_norm",
    "train.log_every_examples",
    "train.checkpoint_every_examples",
)


@dataclass(frozen=True)
class Outcome:
    """What the results say, for the terminal, the page and W&B alike.

    draw: the figure in a colour scheme; caption: how to read it; alternative: the figure in words;
    terms: what the tables' words mean.
    """

    tables: list[Table]
    findings: list[Finding]
    draw: Callable[[Theme], Figure]
    caption: str
    alternative: str
    terms: dict[str, str] = field(default_factory=dict)

    def write_figure(self, directory: Path) -> Path:
        """As figure.svg and as figure.png, whose path is returned, in light colours."""
        for kind in ("svg", "png"):
            (directory / f"figure.{kind}").write_bytes(image(self.draw(LIGHT), kind))
        return directory / "figure.png"


class Study(ABC, Generic[Settings]):
    """One experiment of the laboratory. Its outcome depends on its settings, in conf/experiment/, and its jobs on these
    and on what it reads of the rest."""

    title: ClassVar[str]
    question: ClassVar[str]
    source: ClassVar[str]  # of the claim that is tested: paper or slides, with the place in it
    reads: ClassVar[tuple[str, ...]]  # keys of the configuration, or groups, that jobs depend on beside settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self) -> None:
        """Raises UserError for settings that do not fit each other."""
        for setting in dataclasses.fields(self.settings):
            values, optional = getattr(self.settings, setting.name), setting.default_factory is list
            if isinstance(values, list) and not (optional and not values):
                check_distinct(f"study.{setting.name}", values)

    @abstractmethod
    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        """All jobs of the study, as far as the results that are known tell.

        Called with the results of what it returned before until it returns nothing new: so a study that tunes first,
        and then runs the tuned values, is resumed like any other.
        """

    @abstractmethod
    def outcome(self, results: Sequence[Result]) -> Outcome:
        """Raises ValueError if the results are not those of this study."""

    def root(self, config: Config) -> Path:
        """Where the jobs are kept."""
        return Path(self.settings.runs or Path(config.directory) / "runs")

    def training(
        self, config: Config, optimizer: OptimizerConfig, batch_size: int, seed: int, **coordinates: Coordinate
    ) -> Training:
        """A run as in the configuration, but for these. Its coordinates are method, lr, batch_size, seed and more."""
        tags = [config.name, optimizer.name, f"B={batch_size}"]
        run = dataclasses.replace(
            config,
            seed=seed,
            optimizer=optimizer,
            train=dataclasses.replace(config.train, batch_size=batch_size),
            tracker=dataclasses.replace(config.tracker, job_type=optimizer.name, tags=tags),
        )
        known: dict[str, Coordinate] = {
            "method": optimizer.name,
            "lr": optimizer.lr,
            "batch_size": batch_size,
            "seed": seed,
        }
        return training(self.root(config), run, **(known | coordinates))

    def measurement(
        self, config: Config, function: Callable[..., Any], cost: float = 1.0, **arguments: Coordinate
    ) -> Measurement:
        """A call function(**arguments), whose coordinates they are. The function must be importable."""
        return measurement(self.root(config), function, cost, **arguments)


# Composing takes a quarter of a second, and the jobs of a study are planned anew in every round.
@cache
def default_optimizer(method: str) -> OptimizerConfig:
    """A member of the group `optimizer`, with its own default values."""
    try:
        return compose_config([f"optimizer={method}"]).optimizer
    except MissingConfigException as error:
        raise UserError(f"a study must name members of conf/optimizer: {error}") from error
