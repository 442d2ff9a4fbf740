"""Contests of which runs at the tuned learning rate are followed: what a measurement sees on their way."""

from __future__ import annotations

import dataclasses
import shlex
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from experiments.contest.analysis import contest
from experiments.contest.plan import TunedStudy, contestant
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import ContestConfig, FollowedContestConfig
from experiments.schedule import budget
from experiments.schemas.model import MLPConfig
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config, Decay

S = TypeVar("S", bound=ContestConfig)
F = TypeVar("F", bound=FollowedContestConfig)


class Following(TunedStudy[S]):
    """Once all are tuned, `follow` is asked for the measurements of each run, from the arguments that say which it is:
    one a contestant and seed."""

    masks: ClassVar[bool] = False  # whether a model that is followed may have dropout

    def check(self) -> None:
        super().check()
        if strange := [one for one in self.followed() if any(map(is_of_engine, self.settings.contestants[one]))]:
            raise UserError(f"study.contestants: {', '.join(strange)} must leave the engine: a run is followed without")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        check_followed(config, self.masks)
        s, trained = self.settings, runs_of(known)
        runs = super().jobs(config, trained)
        if len(trained) < len(runs):
            return runs
        found, problem, B = contest(s, trained), problem_of(config), self.followed_at()
        examples = examples_of(config, B)
        followed: list[Job] = []
        for label in self.followed():
            tuned = found.runs[label, B]
            for seed in s.seeds:
                arguments = {
                    "followed": label,
                    "problem": problem,
                    "optimizer": shlex.join(s.contestants[label]),
                    "lr": float(tuned.lr[tuned.tuned(found.everyone)]),
                    "batch_size": B,
                    "warmup": config.train.warmup_examples,
                    "examples": examples,
                    "looks": self.looks(),
                    "seed": seed,
                }
                followed.append(self.follow(config, arguments))
        return [*runs, *followed]

    @abstractmethod
    def followed(self) -> Sequence[str]:
        """The contestants whose runs are."""

    @abstractmethod
    def followed_at(self) -> int:
        """The batch size of those runs."""

    @abstractmethod
    def looks(self) -> int:
        """At a run."""

    @abstractmethod
    def follow(self, config: Config, arguments: dict[str, Any]) -> Job: ...


class FollowedContest(Following[F]):
    """Settings say where runs are followed, and how often they are looked at."""

    def check(self) -> None:
        super().check()
        s = self.settings
        if s.followed_batch_size not in s.batch_sizes:
            raise UserError(f"study.followed_batch_size={s.followed_batch_size} is none of {s.batch_sizes}")
        if s.looks < 2:
            raise UserError(f"study.looks={s.looks}: two or more, or nothing is seen to change")

    def followed_at(self) -> int:
        return self.settings.followed_batch_size

    def looks(self) -> int:
        return self.settings.looks


def check_followed(config: Config, masks: bool = False) -> None:
    """Raises UserError for what laboratory.along does not do."""
    if not masks and isinstance(config.model, MLPConfig) and config.model.dropout > 0:
        raise UserError("model.dropout must be 0 here: with it the true gradient could only be estimated")
    if config.train.decay is not Decay.none or config.train.max_norm is not None:
        raise UserError("train.decay must be none and train.max_norm null here: a run that is followed has neither")


def examples_of(config: Config, batch_size: int) -> int:
    """Of a run of experiments.train."""
    examples = len(data_of(problem_of(config)).train)
    return budget(config.train.epochs, examples, config.evaluation.multiple, batch_size)


def is_of_engine(override: str) -> bool:
    return override.partition("=")[0].partition(".")[0] == "engine"


def runs_of(results: Sequence[Result]) -> list[Result]:
    """Without the measurements."""
    return [result for result in results if "contestant" in result.coordinates]


def optimizer_of(followed: str, optimizer: str, lr: float) -> OptimizerConfig:
    """Of the arguments of a measurement."""
    return dataclasses.replace(contestant(followed, tuple(shlex.split(optimizer))).optimizer, lr=lr)
