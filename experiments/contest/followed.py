"""Contests of which runs at the tuned learning rate are followed: what a measurement sees on their way."""

from __future__ import annotations

import dataclasses
import shlex
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

from experiments.contest.analysis import contest
from experiments.contest.plan import TunedStudy, contestant
from experiments.errors import UserError
from experiments.jobs import Job, Result
from experiments.laboratory.problem import data_of, problem_of
from experiments.laboratory.schemas import FollowedContestConfig
from experiments.schedule import budget
from experiments.schemas.model import MLPConfig
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config, Decay

F = TypeVar("F", bound=FollowedContestConfig)


class FollowedContest(TunedStudy[F]):
    """Once all are tuned, `follow` is asked for the measurements of each run, whose arguments begin with `arguments`:
    one a contestant and seed, at followed_batch_size."""

    def check(self) -> None:
        super().check()
        s = self.settings
        if s.followed_batch_size not in s.batch_sizes:
            raise UserError(f"study.followed_batch_size={s.followed_batch_size} is none of {s.batch_sizes}")
        if s.looks < 2:
            raise UserError(f"study.looks={s.looks}: two or more, or nothing is seen to change")

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        s, train = self.settings, config.train
        if isinstance(config.model, MLPConfig) and config.model.dropout > 0:
            raise UserError("model.dropout must be 0 here: with it the true gradient could only be estimated")
        if train.decay is not Decay.none or train.max_norm is not None:
            raise UserError("train.decay must be none and train.max_norm null here: a run that is followed has neither")
        trained = runs_of(known)
        runs = super().jobs(config, trained)
        if len(trained) < len(runs):
            return runs
        found, problem = contest(s, trained), problem_of(config)
        examples = budget(train.epochs, len(data_of(problem).train), config.evaluation.multiple, s.followed_batch_size)
        followed: list[Job] = []
        for label in self.followed():
            tuned = found.runs[label, s.followed_batch_size]
            for seed in s.seeds:
                arguments = {
                    "followed": label,
                    "problem": problem,
                    "optimizer": shlex.join(s.contestants[label]),
                    "lr": float(tuned.lr[tuned.tuned(found.everyone)]),
                    "batch_size": s.followed_batch_size,
                    "warmup": train.warmup_examples,
                    "examples": examples,
                    "looks": s.looks,
                    "seed": seed,
                }
                followed.append(self.follow(config, arguments))
        return [*runs, *followed]

    @abstractmethod
    def followed(self) -> Sequence[str]:
        """The contestants whose runs are."""

    @abstractmethod
    def follow(self, config: Config, arguments: dict[str, Any]) -> Job: ...


def runs_of(results: Sequence[Result]) -> list[Result]:
    """Without the measurements."""
    return [result for result in results if "contestant" in result.coordinates]


def optimizer_of(followed: str, optimizer: str, lr: float) -> OptimizerConfig:
    """Of the arguments of a measurement."""
    return dataclasses.replace(contestant(followed, tuple(shlex.split(optimizer))).optimizer, lr=lr)
