"""What every method reaches at its tuned learning rate, at every epsilon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, Rows, geometric_mean, over_rows
from experiments.jobs import Result
from experiments.laboratory.private.methods import METHODS
from experiments.laboratory.private.peers import BASES, KEPT, OURS, PEERS
from experiments.laboratory.schemas import PrivateConfig

OTHERS = tuple(name for name in PEERS if name != OURS)


@dataclass(frozen=True)
class Runs:
    """Of one method at one epsilon: by seed and learning rate (S, L), ln of the training loss, held-out accuracy, the
    share of noise in the second moment, and of examples that were clipped."""

    octaves: tuple[float, ...]
    log_loss: Array
    accuracy: Array
    noise_share: Array
    clipped: Array
    sigma: float
    spent: float
    steps: int

    def tuned(self, rows: Rows) -> int:
        """The position of the learning rate with the lowest training loss."""
        return int(self.log_loss[rows].mean(axis=0).argmin())


@dataclass(frozen=True)
class Analysis:
    """runs: None is no privacy. difference: from Opacus' parameters, by base optimizer and Opacus' step (S,);
    seconds: of a step, the median (S,)."""

    settings: PrivateConfig
    runs: dict[tuple[str, float | None], Runs]
    difference: dict[tuple[str, str], Array]
    seconds: dict[str, Array]

    @property
    def everyone(self) -> Rows:
        return np.arange(len(self.settings.seeds))

    def over(self, statistic: Callable[[Rows], float], percent: bool = False) -> Estimate:
        """A statistic of the runs of some seeds, with its interval."""
        return dataclasses.replace(over_rows(len(self.everyone), statistic), percent=percent)

    def mean(self, method: str, epsilon: float | None, values: str, rows: Rows) -> float:
        """Over seeds, at the learning rate that they tune."""
        runs = self.runs[method, epsilon]
        return float(getattr(runs, values)[rows, runs.tuned(rows)].mean())

    def accuracy(self, method: str, epsilon: float | None) -> Estimate:
        return self.over(lambda rows: self.mean(method, epsilon, "accuracy", rows), percent=True)

    def loss(self, method: str, epsilon: float | None) -> Estimate:
        return self.over(lambda rows: self.mean(method, epsilon, "log_loss", rows)).exp()

    def ahead(self, first: str, second: str, epsilon: float | None) -> Estimate:
        """Accuracy of the one above that of the other."""
        return self.over(
            lambda rows: self.mean(first, epsilon, "accuracy", rows) - self.mean(second, epsilon, "accuracy", rows),
            percent=True,
        )

    def lost(self, method: str, epsilon: float) -> Estimate:
        """Accuracy below that of the same method without privacy."""
        return self.over(
            lambda rows: self.mean(method, None, "accuracy", rows) - self.mean(method, epsilon, "accuracy", rows),
            percent=True,
        )

    def noise_share(self, method: str, epsilon: float) -> Estimate:
        return self.over(lambda rows: self.mean(method, epsilon, "noise_share", rows), percent=True)

    def clipped(self, method: str, epsilon: float) -> Estimate:
        return self.over(lambda rows: self.mean(method, epsilon, "clipped", rows), percent=True)

    def best(self, epsilon: float | None) -> str:
        """The method with the lowest training loss, which is what is tuned."""
        return self._best(epsilon, self.everyone)

    def best_accuracy(self, epsilon: float | None) -> Estimate:
        """That of the best method, which is chosen anew in every resample."""
        return self.over(lambda rows: self._best_accuracy(epsilon, rows), percent=True)

    def price(self, epsilon: float) -> Estimate:
        """Accuracy of the best method below that of the best one without privacy, whichever they are."""
        return self.over(
            lambda rows: self._best_accuracy(None, rows) - self._best_accuracy(epsilon, rows), percent=True
        )

    def _best(self, epsilon: float | None, rows: Rows) -> str:
        return min(METHODS, key=lambda method: self.mean(method, epsilon, "log_loss", rows))

    def _best_accuracy(self, epsilon: float | None, rows: Rows) -> float:
        return self.mean(self._best(epsilon, rows), epsilon, "accuracy", rows)

    def times(self, other: str) -> Estimate:
        """What a step of it takes, over ours."""
        return geometric_mean(self.seconds[other] / self.seconds[OURS])


def losses(results: Sequence[Result], method: str, epsilon: float | None) -> dict[float, list[float]]:
    """Of all seeds, by octave."""
    found: dict[float, list[float]] = {}
    for result in results:
        octave = result.coordinates.get("octave")
        if isinstance(octave, float) and _of(result, method, epsilon):
            found.setdefault(octave, []).append(result.found["loss"])
    return found


def _of(result: Result, method: str, epsilon: float | None) -> bool:
    where = result.coordinates
    return "octave" in where and where["method"] == method and where["epsilon"] == epsilon


def analyse(settings: PrivateConfig, results: Sequence[Result]) -> Analysis:
    """Raises ValueError unless the results of every method and epsilon are a grid."""
    runs: dict[tuple[str, float | None], Runs] = {}
    for method in METHODS:
        for epsilon in (*settings.epsilons, None):
            runs[method, epsilon] = _runs([result for result in results if _of(result, method, epsilon)])
    checked = [result for result in results if "base" in result.coordinates]
    differences = [result for result in checked if KEPT in result.found and not isinstance(result.found[KEPT], list)]
    difference = {
        (base, other): cube(differences, ("seed",), itemgetter(other), base=base).values
        for base in BASES
        for other in OTHERS
    }
    timed = [result for result in checked if OURS in result.found]
    medians = cube(timed, ("seed",), lambda found: [float(np.median(found[name])) for name in PEERS]).values
    seconds = dict(zip(PEERS, medians.T, strict=True))
    return Analysis(settings, runs, difference, seconds)


def _runs(results: Sequence[Result]) -> Runs:
    ordered = sorted(results, key=lambda result: float(result.coordinates["octave"] or 0.0))

    def of(name: str) -> Array:
        return cube(ordered, ("seed", "octave"), lambda found: np.nan if found[name] is None else found[name]).values

    first = ordered[0].found
    return Runs(
        tuple(sorted({float(result.coordinates["octave"] or 0.0) for result in ordered})),
        np.log(of("loss")),
        of("test_accuracy"),
        of("noise_share"),
        of("clipped"),
        first["sigma"],
        np.nan if first["epsilon"] is None else first["epsilon"],
        first["steps"],
    )
