"""Who takes part in a contest, and the runs that tune all of them alike."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np
from hydra.errors import HydraException

from experiments.config import compose_config
from experiments.contest.analysis import Contest, contest
from experiments.contest.figure import alternative, caption, draw
from experiments.contest.tables import TERMS, tables
from experiments.errors import UserError
from experiments.estimate import Finding
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.record import Record
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config, EngineConfig
from experiments.study import OF_RUNS, Outcome, Study

FARTHEST = 6  # octaves from where it began: a factor 64

S = TypeVar("S", bound=ContestConfig)
Losses = dict[float, list[float]]  # of all seeds, by octave


@dataclass(frozen=True)
class Contestant:
    optimizer: OptimizerConfig
    engine: EngineConfig


@cache
def contestant(label: str, overrides: tuple[str, ...]) -> Contestant:
    """Raises UserError for overrides of anything but an optimizer and the engine that gathers for it."""
    if strangers := [o for o in overrides if o.partition("=")[0].partition(".")[0] not in ("optimizer", "engine")]:
        raise UserError(f"study.contestants: {label} has {strangers}; contestants differ in optimizer and engine only")
    try:
        config = compose_config(list(overrides))
    except HydraException as error:
        raise UserError(f"study.contestants: {label} cannot be composed: {error}") from error
    return Contestant(config.optimizer, config.engine)


class TunedStudy(Study[S]):
    """Every contestant is tuned at every batch size: over `octaves` of its own default learning rate, and further for
    as long as the best of them lies at an end, by any of the criteria.
    """

    reads = tuple(key for key in OF_RUNS if key != "engine")

    def check(self) -> None:
        super().check()
        self.contestants()
        if missing := {*self.required(), self.settings.reference} - set(self.settings.contestants):
            raise UserError(f"study.contestants lacks {', '.join(sorted(missing))}, which the findings are about")
        if len(self.settings.octaves) < 3:
            raise UserError(f"study.octaves={self.settings.octaves}: three or more, or none has neighbours")

    def contestants(self) -> dict[str, Contestant]:
        return {label: contestant(label, tuple(o)) for label, o in self.settings.contestants.items()}

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        settings = self.settings
        planned: list[tuple[int, float, Job]] = []
        for (label, one), B in product(self.contestants().items(), settings.batch_sizes):
            of_one = dataclasses.replace(config, engine=one.engine)
            octaves = sorted({o for losses in self.losses(known, label, B) for o in bracket(settings.octaves, losses)})
            for octave, seed in product(octaves, settings.seeds):
                optimizer = dataclasses.replace(one.optimizer, lr=one.optimizer.lr * 2**octave)
                job = self.training(of_one, optimizer, B, seed, contestant=label, octave=octave)
                planned.append((seed, octave, job))
        # Contestants take turns, so that a change of the machine's speed meets all of them alike.
        return [job for *_, job in sorted(planned, key=lambda row: row[:2])]

    def losses(self, known: Sequence[Result], label: str, B: int) -> list[Losses]:
        """By each of the criteria."""
        scores: list[Losses] = []
        for result in known:
            if (result.coordinates["contestant"], result.coordinates["batch_size"]) == (label, B):
                octave = result.coordinates["octave"]
                assert isinstance(octave, float)
                criteria = self.criteria(result.found)
                scores = scores or [{} for _ in criteria]
                for by_octave, score in zip(scores, criteria, strict=True):
                    by_octave.setdefault(octave, []).append(score)
        return scores or [{}]

    def criteria(self, record: Record) -> list[float]:
        """What learning rates are tuned for, each above 0 and better the lower; inf where it cannot be had."""
        # No loss counts for more than the first. So where none is better, lower learning rates are tried.
        return [min(record.final_train_loss, record.train_loss[0])]

    @abstractmethod
    def required(self) -> Sequence[str]:
        """The contestants that findings are about."""


class ContestStudy(TunedStudy[S]):
    """A subclass asks the question, and states the findings."""

    @abstractmethod
    def findings(self, found: Contest) -> list[Finding]: ...

    def analysed(self, results: Sequence[Result]) -> Contest:
        return contest(self.settings, results)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        found = self.analysed(results)
        return Outcome(
            tables=tables(found),
            findings=[*self.findings(found), *found.notes()],
            draw=lambda theme: draw(found, theme),
            caption=caption(found),
            alternative=alternative(found),
            terms=TERMS | intervals(len(self.settings.seeds), "tuning is repeated") | DIVERGED,
        )


def bracket(octaves: Sequence[float], losses: Losses) -> list[float]:
    """Those to run, given the losses of those that were: the first ones, and the neighbours that the best lacks."""
    if not losses:
        return [float(octave) for octave in sorted(octaves)]
    if not np.isfinite([np.log(of_one).mean() for of_one in losses.values()]).any():
        return sorted(losses)
    best, step = best_octave(losses), float(min(np.diff(sorted(octaves))))
    return sorted({*losses, *(octave for octave in (best - step, best + step) if abs(octave) <= FARTHEST)})


def best_octave(losses: Losses) -> float:
    """That of the lowest geometric mean."""
    return min(sorted(losses), key=lambda octave: float(np.log(losses[octave]).mean()))


def tuned_octave(octaves: Sequence[float], losses: Losses) -> float | None:
    """The best one, once it has a neighbour on either side."""
    return best_octave(losses) if losses and not set(bracket(octaves, losses)) - set(losses) else None
