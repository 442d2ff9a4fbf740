"""The best learning rate at one batch size: a coarse look at short runs, octaves around it in full, and a parabola.

Octaves are powers of two times the learning rate that the configuration has. Every learning rate is run with the same
seeds, and what diverges counts with the loss of its initial model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from rich.console import Console

from experiments.errors import UserError
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Job, load, run_jobs, training
from experiments.parabola import lowest_point
from experiments.record import Record
from experiments.schemas.optimizer import OptimizerConfig
from experiments.schemas.run import Config, TuneConfig

LOOK = (-4, -2, 0, 2, 4)  # octaves of the coarse look: a factor 256
FARTHEST = 14  # octaves from where it began: a factor 16,384

Optimizer = TypeVar("Optimizer", bound=OptimizerConfig)
Losses = dict[int, Array]  # by octave: (S, 2), final training and held-out loss of every seed


@dataclass(frozen=True)
class Tuned(Generic[Optimizer]):
    """optimizer: with the best lr, at the parabola's lowest point; octave: where it lies, from where the search began.

    losses are those of the full budget, by octave; the lr tuned itself was not run.
    """

    optimizer: Optimizer
    octave: Estimate
    losses: Losses

    @property
    def lr(self) -> Estimate:
        first = self.optimizer.lr / 2**self.octave.value
        value, low, high = (first * 2**octave for octave in (self.octave.value, self.octave.low, self.octave.high))
        return Estimate(value, low, high)

    @property
    def best(self) -> int:
        """The octave of the lowest mean training loss."""
        return best_octave(self.losses)

    def table(self) -> Array:
        """(S, L, 2), by rising octave."""
        return np.stack([self.losses[octave] for octave in sorted(self.losses)], axis=1)


class Tuner:
    """Runs of one configuration, kept below a directory and found there again."""

    def __init__(self, config: Config, tune: TuneConfig, directory: Path, console: Console) -> None:
        self.config = config
        self.tune = tune
        self.root = directory / "runs"
        self.console = console
        self.jobs: dict[Path, Job] = {}  # all that were asked for

    def losses(self, optimizers: Sequence[OptimizerConfig], batch_size: int, share: float = 1.0) -> list[Array]:
        """(S, 2) for each optimizer, after this share of the budget."""
        planned = [
            [self.job(optimizer, batch_size, share, seed) for seed in self.tune.seeds] for optimizer in optimizers
        ]
        jobs = [job for row in planned for job in row]
        self.jobs |= {job.directory: job for job in jobs}
        run_jobs(jobs, self.tune.workers, self.console)
        return [np.array([final(load(job.directory, job.coordinates).found) for job in row]) for row in planned]

    def job(self, optimizer: OptimizerConfig, batch_size: int, share: float, seed: int) -> Job:
        plan = self.config.train
        # The warm-up keeps its place in the run, or a short one would be all warm-up.
        warmup = round(share * plan.warmup_examples)
        plan = dataclasses.replace(plan, batch_size=batch_size, epochs=share * plan.epochs, warmup_examples=warmup)
        tracker = dataclasses.replace(self.config.tracker, job_type=optimizer.name, tags=["tune", f"B={batch_size}"])
        run = dataclasses.replace(self.config, seed=seed, optimizer=optimizer, train=plan, tracker=tracker)
        return training(self.root, run, method=optimizer.name, lr=optimizer.lr, batch_size=batch_size, seed=seed)

    def look(self, candidates: Sequence[Optimizer], batch_size: int) -> Optimizer:
        """The candidate and the octave of the lowest training loss after a share of the budget."""
        found = []
        for candidate in candidates:
            losses = bracketed(partial(self.at, candidate, batch_size, self.tune.share), LOOK, 2)
            octave = best_octave(losses)
            found.append((float(losses[octave][:, 0].mean()), moved(candidate, octave)))
        return min(found, key=lambda pair: pair[0])[1]

    def refine(self, optimizer: Optimizer, batch_size: int) -> Tuned[Optimizer]:
        """With the full budget, an octave around where it begins, and further while the best is at the edge."""
        losses = bracketed(partial(self.at, optimizer, batch_size, 1.0), (-1, 0, 1), 1)
        octaves = np.array(sorted(losses))
        rows = np.stack([losses[octave][:, 0] for octave in octaves], axis=1)  # (S, L)
        octave = over_seeds(rows, lambda drawn: lowest_point(octaves, drawn.mean(axis=0)))
        return Tuned(moved(optimizer, octave.value), octave, losses)

    def at(self, optimizer: OptimizerConfig, batch_size: int, share: float, octaves: Sequence[int]) -> Losses:
        found = self.losses([moved(optimizer, octave) for octave in octaves], batch_size, share)
        return dict(zip(octaves, found, strict=True))


def final(record: Record) -> tuple[float, float]:
    """Training loss, at most that of the initial model, and held-out loss."""
    return min(record.train_loss[0], record.final_train_loss), record.final_test_loss


def moved(optimizer: Optimizer, octaves: float) -> Optimizer:
    # To four digits, with which a command line is short and exact.
    return dataclasses.replace(optimizer, lr=float(f"{optimizer.lr * 2**octaves:.4g}"))


def best_octave(losses: Losses) -> int:
    return min(losses, key=lambda octave: float(losses[octave][:, 0].mean()))


def bracketed(measure: Callable[[Sequence[int]], Losses], first: Iterable[int], step: int) -> Losses:
    """Measures until the best octave has a neighbour on either side. Raises UserError if it goes on for too long."""
    losses = measure(tuple(first))
    while edges := [o for o in (best_octave(losses) - step, best_octave(losses) + step) if o not in losses]:
        if max(map(abs, edges)) > FARTHEST:
            raise UserError(
                f"the training loss still falls {FARTHEST} octaves from where the search of the learning rate began: "
                "begin closer to the best one with optimizer.lr, or train for longer"
            )
        losses |= measure(edges)
    return losses
