"""The search of a learning rate, where losses are known in closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments import tuning
from experiments.config import compose_config
from experiments.errors import UserError
from experiments.estimate import widening
from experiments.jobs import Coordinate, Job, Result, Training
from experiments.record import Record
from experiments.schemas.optimizer import BatchInvariantAdamConfig
from experiments.schemas.run import TuneConfig
from experiments.tuning import FARTHEST, Losses, Tuner, best_octave, bracketed, final, moved

TUNE = TuneConfig(16, [None], [1], 0.25, [0, 1, 2], 16, None, 1)


class Bowl:
    """In the place of jobs: ln(loss) is a parabola in log2(lr / best), moved along by the seed, and higher for R = 4.

    A look prefers an octave more, as short runs do.
    """

    def __init__(self, best: float) -> None:
        self.best = best
        self.runs: list[tuple[float, float, int]] = []  # lr, epochs, seed

    def run_jobs(self, jobs: Sequence[Job], workers: int | None, console: Console) -> None:
        for job in jobs:
            assert isinstance(job, Training)
            self.runs.append((job.config.optimizer.lr, job.config.train.epochs, job.config.seed))
        self.known = {job.directory: job for job in jobs}

    def load(self, directory: Path, coordinates: dict[str, Coordinate]) -> Result:
        job = self.known[directory]
        assert isinstance(job, Training) and isinstance(job.config.optimizer, BatchInvariantAdamConfig)
        octaves = math.log2(job.config.optimizer.lr / self.best) - 0.1 * (job.config.seed - 1)
        octaves -= job.config.train.epochs < 24
        loss = 0.1 * math.exp(0.1 * octaves**2) * (3 if job.config.optimizer.reference_batch_size == 4 else 1)
        record = Record("", "", 0.0, 16, 0, "", "finished", [0, 256], [2.3, min(loss, 2.0)], [2.3, 3 * loss])
        return Result(coordinates, record, 0.0)


@pytest.fixture
def bowl(monkeypatch: pytest.MonkeyPatch) -> Bowl:
    found = Bowl(best=0.0123)
    monkeypatch.setattr(tuning, "run_jobs", found.run_jobs)
    monkeypatch.setattr(tuning, "load", found.load)
    return found


def tuner(**values: object) -> tuple[Tuner, BatchInvariantAdamConfig]:
    config = compose_config(["tracker=none"])
    assert isinstance(config.optimizer, BatchInvariantAdamConfig)
    changed = dataclasses.replace(TUNE, **values)  # type: ignore[arg-type]
    return Tuner(config, changed, Path("unused"), Console(quiet=True)), config.optimizer


@pytest.mark.parametrize("start", [1e-4, 0.008, 1.0])
def test_the_best_learning_rate_is_found_from_afar(bowl: Bowl, start: float) -> None:
    runs, optimizer = tuner()
    begun = dataclasses.replace(optimizer, lr=start)
    tuned = runs.refine(runs.look([begun], 16), 16)
    assert tuned.lr.value == pytest.approx(bowl.best, rel=1e-3)
    assert tuned.optimizer.lr == pytest.approx(bowl.best, rel=1e-3)
    # Three seeds move it by a tenth of an octave, which the interval widens for their number.
    low, high = (np.log2(end / bowl.best) / widening(3) for end in (tuned.lr.low, tuned.lr.high))
    assert -0.101 < low < -0.05 and 0.05 < high < 0.101


def test_a_short_look_comes_first_and_all_have_the_same_seeds(bowl: Bowl) -> None:
    runs, optimizer = tuner()
    runs.refine(runs.look([optimizer], 16), 16)
    by_length = {epochs: {lr for lr, length, _ in bowl.runs if length == epochs} for _, epochs, _ in bowl.runs}
    assert list(by_length) == [6, 24] and len(by_length[6]) == 5 and len(by_length[24]) <= 4
    assert len(bowl.runs) == len(set(bowl.runs)) == 3 * sum(map(len, by_length.values()))
    (look, *_) = (job for job in runs.jobs.values() if isinstance(job, Training))
    assert look.config.train.warmup_examples == 1024 and look.config.train.epochs == 6


def test_the_better_of_two_candidates_is_tuned(bowl: Bowl) -> None:
    runs, optimizer = tuner()
    candidates = [dataclasses.replace(optimizer, reference_batch_size=R) for R in (4.0, 1.0)]
    assert runs.look(candidates, 16).reference_batch_size == 1


def test_what_falls_for_ever_is_a_user_error() -> None:
    def falls(octaves: Sequence[int]) -> Losses:
        return {octave: np.full((2, 2), 2.0**-octave) for octave in octaves}

    with pytest.raises(UserError, match=f"still falls {FARTHEST} octaves"):
        bracketed(falls, (-1, 0, 1), 1)


def test_the_best_has_neighbours_at_the_step() -> None:
    def bowl(octaves: Sequence[int]) -> Losses:
        return {octave: np.full((1, 2), float((octave - 7) ** 2)) for octave in octaves}

    assert sorted(bracketed(bowl, (-2, 0, 2), 2)) == [-2, 0, 2, 4, 6, 8]
    assert best_octave(bracketed(bowl, (-1, 0, 1), 1)) == 7


def test_a_run_that_diverged_counts_as_its_beginning() -> None:
    record = Record("", "", 0.0, 16, 0, "", "diverged", [0, 256], [2.3, 1.0], [2.4, 1.1])
    assert final(record) == (2.3, 2.4)
    assert final(dataclasses.replace(record, status="finished")) == (1.0, 1.1)
    assert final(dataclasses.replace(record, status="finished", train_loss=[2.3, 50.0])) == (2.3, 1.1)


def test_octaves_are_of_the_learning_rate() -> None:
    _, optimizer = tuner()
    assert moved(optimizer, 3).lr == 0.064 and moved(optimizer, -1).lr == 0.004
