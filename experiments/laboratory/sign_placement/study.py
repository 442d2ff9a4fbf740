"""The sign of a gradient before the mean over a batch, after it, and after the running average."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.contest.analysis import Contest
from experiments.contest.followed import Following, runs_of
from experiments.contest.plan import ContestStudy
from experiments.cube import cube
from experiments.documents import Table
from experiments.estimate import Array, Estimate, Finding, Verdict, geometric_mean, over_seeds
from experiments.jobs import Job, Result
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.sign_placement.signal import signals
from experiments.schemas.run import Config
from experiments.study import Outcome

BEFORE, AFTER, AVERAGE = "before the mean", "after the mean", "after the running average"
PLACES = {BEFORE: "before", AFTER: "after", AVERAGE: "average"}  # as the measurement calls them
PAIRS = ((BEFORE, AFTER), (AVERAGE, AFTER), (AVERAGE, BEFORE))
LOOKS = 3  # at thirds of the run


class SignPlacement(Following[ContestConfig], ContestStudy[ContestConfig]):
    title = "Where to take the sign"
    question = "Does the sign belong before the mean over examples, after it, or after the running average?"
    source = "Bernstein et al. 2018, arXiv:1802.04434: signSGD and Signum, and the signal-to-noise ratio that decides"
    masks = True  # those of the run: its signal is with them

    def required(self) -> Sequence[str]:
        return (BEFORE, AFTER, AVERAGE)

    def followed(self) -> Sequence[str]:
        return (AVERAGE,)

    def followed_at(self) -> int:
        return min(self.settings.batch_sizes)

    def looks(self) -> int:
        return LOOKS

    def follow(self, config: Config, arguments: dict[str, Any]) -> Job:
        one = self.contestants()[arguments["followed"]].optimizer
        of_run = {name: value for name, value in arguments.items() if name not in ("followed", "optimizer")}
        sizes = " ".join(map(str, self.settings.batch_sizes))
        return self.measurement(config, signals, **of_run, method=one.name, sizes=sizes)

    def findings(self, found: Contest) -> list[Finding]:
        sizes = found.settings.batch_sizes
        return [_better(found, *pair, B) for pair in PAIRS for B in sizes]

    def outcome(self, results: Sequence[Result]) -> Outcome:
        found, of_runs = self.analysed(runs_of(results)), super().outcome(runs_of(results))
        signal = signal_of([result for result in results if "looks" in result.coordinates])
        return dataclasses.replace(
            of_runs,
            tables=[*of_runs.tables, _table(found, signal)],
            findings=[*(_predicted(found, signal, B) for B in self.settings.batch_sizes), *of_runs.findings],
            terms=of_runs.terms | TERMS,
        )


def signal_of(results: Sequence[Result]) -> Array:
    """Geometric mean over the moments, (S, place, B)."""
    looks = cube(results, ("seed",), lambda f: [[list(look[p].values()) for p in PLACES.values()] for look in f]).values
    return np.exp(np.log(looks).mean(axis=1))


def _better(found: Contest, first: str, second: str, B: int) -> Finding:
    ratio = found.ratio(first, second, B)
    return Finding(
        f"B = {B}: the sign {first} trains better than {second}",
        ratio.verdict(1),
        f"{found.compared(first, second, B)}.",
    )


def _signal(signal: Array, place: str, column: int) -> Estimate:
    return over_seeds(signal[:, list(PLACES).index(place), column])


def _less(signal: Array, first: str, second: str, column: int) -> Estimate:
    """Signal of the first over that of the second."""
    one, other = (signal[:, list(PLACES).index(place), column] for place in (first, second))
    return geometric_mean(one / other)


def _predicted(found: Contest, signal: Array, B: int) -> Finding:
    """Of every pair that can be told apart by loss and by signal, is the one with more signal the one that trains
    better?"""
    column = found.settings.batch_sizes.index(B)
    right: list[str] = []
    wrong: list[str] = []
    for first, second in PAIRS:
        trains_better = found.ratio(first, second, B).verdict(1)
        has_more = _less(signal, second, first, column).verdict(1)
        if "cannot be judged" not in (trains_better, has_more):
            (right if has_more == trains_better else wrong).append(f"{first} and {second}")
    judged: Verdict = "does not hold" if wrong else "holds" if right else "cannot be judged"
    told = ", ".join(f"{place} {_signal(signal, place, column)}" for place in PLACES)
    return Finding(
        f"B = {B}: the place with the larger signal-to-noise ratio trains better",
        judged,
        f"The squared cosine between gradient and step is {told}. Of the pairs whose losses and signals differ by more "
        f"than seeds explain it predicts {len(right)} right ({'; '.join(right) or 'none'}) and {len(wrong)} wrong "
        f"({'; '.join(wrong) or 'none'}).",
    )


def _table(found: Contest, signal: Array) -> Table:
    sizes = found.settings.batch_sizes
    return Table(
        title="Signal of a step",
        explanation="The squared cosine between gradient and step, noise included: geometric mean over "
        f"{LOOKS} moments of the tuned run of the sign {AVERAGE} at B = {min(sizes)}, mean over seeds.",
        columns=["Sign", *(f"B = {B}" for B in sizes)],
        rows=[[place, *(_signal(signal, place, i) for i in range(len(sizes)))] for place in PLACES],
        emphasised=(),
    )


TERMS = {
    "Signal": "<mu, E u>^2 / (|mu|^2 E|u|^2), with mu the gradient and u the step before the learning rate, after an "
    "average over the momentum's horizon: measured on draws of batches at fixed parameters, with the model's dropout.",
}
STUDY = SignPlacement
