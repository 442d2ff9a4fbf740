"""What every contestant reaches at its tuned learning rate, and how it compares with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, Finding, Rows, Verdict, at_edge, notes, over_rows
from experiments.jobs import Result
from experiments.laboratory.schemas import ContestConfig
from experiments.parabola import lowest_point
from experiments.record import Record


@dataclass(frozen=True)
class Runs:
    """Those of one contestant at one batch size, by seed and octave. Losses are logarithms: train and test (S, L), and
    `curve` (S, L, T) of the training loss after `examples` (T,); a run that diverged has its first everywhere."""

    octaves: Array
    lr: Array
    train: Array
    test: Array
    curve: Array
    examples: tuple[int, ...]
    seconds: Array  # (S, L)

    def tuned(self, rows: Rows, point: int = -1) -> int:
        """The position of the learning rate with the lowest training loss at a point of the curve."""
        values = self.train if point == -1 else self.curve[..., point]
        return int(values[rows].mean(axis=0).argmin())


@dataclass(frozen=True)
class Contest:
    settings: ContestConfig
    runs: dict[tuple[str, int], Runs]

    @property
    def labels(self) -> list[str]:
        return list(self.settings.contestants)

    @property
    def everyone(self) -> Rows:
        return np.arange(len(self.settings.seeds))

    def over(self, statistic: Callable[[Rows], float]) -> Estimate:
        """A statistic of the runs of some seeds, with its interval."""
        return over_rows(len(self.everyone), statistic)

    def over_log(self, statistic: Callable[[Rows], float]) -> Estimate:
        """Of what this is the logarithm of, whose interval is above 0."""
        return self.over(statistic).exp()

    def over_finite(self, statistic: Callable[[Rows], float]) -> Estimate:
        """Of a positive statistic that may be no number, with an interval above 0: none unless it is a number in every
        resample."""
        seen: list[float] = []

        def log(rows: Rows) -> float:
            value = statistic(rows)
            seen.append(float(np.log(value)) if value > 0 and np.isfinite(value) else np.nan)
            return seen[-1]

        found = self.over_log(log)
        return found if np.isfinite(seen).all() else Estimate(found.value, np.nan, np.nan)

    def best(self, label: str, B: int) -> int:
        """Where its learning rates have the tuned one."""
        return self.runs[label, B].tuned(self.everyone)

    def at_equal_seconds(self, label: str, other: str, B: int) -> Estimate:
        """Training loss of the one over that of the other, after as long as the faster one's run takes, each at the
        learning rate that is best by then: interpolated in ln(loss), along examples."""

        def log_losses(rows: Rows) -> list[float]:
            runs = [self.runs[name, B] for name in (label, other)]
            seconds = [float(np.median(one.seconds[rows])) for one in runs]
            return [
                min(float(np.interp(min(seconds) / own * one.examples[-1], one.examples, curve)) for curve in curves)
                for one, own in zip(runs, seconds, strict=True)
                for curves in (one.curve[rows].mean(axis=0),)
            ]

        def log_ratio(rows: Rows) -> float:
            first, second = log_losses(rows)
            return first - second

        return self.over_log(log_ratio)

    def best_octave(self, label: str, B: int, rows: Rows) -> float:
        """That of the lowest training loss, between octaves by a parabola (experiments.parabola)."""
        runs = self.runs[label, B]
        return lowest_point(runs.octaves, np.exp(runs.train[rows].mean(axis=0)))

    def loss(self, label: str, B: int) -> Estimate:
        """Training loss, the geometric mean over seeds."""
        return self.over_log(lambda rows: self.log_loss(label, B, rows))

    def held_out(self, label: str, B: int) -> Estimate:
        """Held-out loss at the learning rate that is tuned for the training loss."""
        runs = self.runs[label, B]
        return self.over_log(lambda rows: float(runs.test[rows, runs.tuned(rows)].mean()))

    def ratio(self, label: str, other: str, B: int) -> Estimate:
        """Of training losses, each at its tuned learning rate."""
        return self.over_log(lambda rows: self.log_loss(label, B, rows) - self.log_loss(other, B, rows))

    def compared(self, label: str, other: str, B: int) -> str:
        """The same in words."""
        losses = f"{self.loss(label, B)} against {self.loss(other, B)}"
        return f"Training loss {losses}, a ratio of {self.ratio(label, other, B)}"

    def doubled(self, label: str, B: int) -> Estimate:
        """Training loss at the next octave, over that at the tuned learning rate."""
        return self.over_log(lambda rows: self.log_doubled(label, B, rows))

    def log_doubled(self, label: str, B: int, rows: Rows) -> float:
        """Not a number where the tuned learning rate is the highest."""
        runs = self.runs[label, B]
        above = runs.tuned(rows) + 1
        return at(runs, rows, above) - at(runs, rows) if above < len(runs.octaves) else np.nan

    def kept(self, label: str, B: int, home: int) -> Estimate:
        """Training loss at B with the learning rate tuned at another batch size, over that with its own: at least that
        where it was not run at B."""
        here, there = self.runs[label, B], self.runs[label, home]

        def price(rows: Rows) -> float:
            # An octave that was not needed here is at least as bad as the end that is closer to the best.
            lr = int(np.abs(here.octaves - there.octaves[there.tuned(rows)]).argmin())
            return at(here, rows, lr) - at(here, rows)

        return self.over_log(price)

    def is_kept(self, label: str, B: int, home: int, bar: float) -> Verdict:
        """Whether `kept` is at most the bar: of what is only known to be at least so much, that cannot be seen."""
        verdict = self.kept(label, B, home).verdict(bar)
        known = self.runs[label, home].octaves[self.best(label, home)] in self.runs[label, B].octaves
        return verdict if known or verdict == "does not hold" else "cannot be judged"

    def time_ratio(self, label: str, other: str, B: int) -> Estimate:
        """Of the seconds of runs, each a median over the learning rates."""
        first, second = (np.log(np.median(self.runs[name, B].seconds, axis=1)) for name in (label, other))
        return self.over_log(lambda rows: float((first[rows] - second[rows]).mean()))

    def seconds(self, label: str, B: int) -> float:
        """Of a run: a median, so that what else the machine did is left out."""
        return float(np.median(self.runs[label, B].seconds))

    def log_loss(self, label: str, B: int, rows: Rows) -> float:
        return at(self.runs[label, B], rows)

    def notes(self) -> list[Finding]:
        edges = [
            f"{label} at B = {B}"
            for (label, B), runs in self.runs.items()
            if self.best(label, B) in (0, len(runs.octaves) - 1)
        ]
        return notes(at_edge("lr", edges))


def at(runs: Runs, rows: Rows, lr: int | None = None) -> float:
    """Mean of ln training loss, at the tuned learning rate by default; so every resample is tuned anew."""
    return float(runs.train[rows, runs.tuned(rows) if lr is None else lr].mean())


def contest(settings: ContestConfig, results: Sequence[Result]) -> Contest:
    """Raises ValueError unless the results of every contestant and batch size are a grid."""
    runs: dict[tuple[str, int], Runs] = {}
    for label in settings.contestants:
        for B in settings.batch_sizes:
            runs[label, B] = runs_of(
                [r for r in results if (r.coordinates["contestant"], r.coordinates["batch_size"]) == (label, B)]
            )
    return Contest(settings, runs)


def runs_of(results: Sequence[Result]) -> Runs:
    """Of one contestant at one batch size."""
    ordered = sorted(results, key=lambda r: float(r.coordinates["octave"] or 0.0))
    finished = [set(r.found.examples) for r in ordered if r.found.status == "finished"]
    if not finished:
        raise ValueError(f"every run of {ordered[0].coordinates} diverged: begin at lower octaves")
    examples = tuple(sorted(set.intersection(*finished)))

    def curve(record: Record) -> list[float]:
        seen = dict(zip(record.examples, record.train_loss, strict=True))
        first = record.train_loss[0]
        return [first if record.status == "diverged" else min(seen[count], first) for count in examples]

    def of(value: Callable[[Record], float | list[float]]) -> Array:
        return cube(ordered, ("seed", "octave"), value).values

    return Runs(
        np.array(sorted({float(r.coordinates["octave"] or 0.0) for r in ordered})),
        np.array(sorted({r.found.lr for r in ordered})),
        np.log(of(lambda record: min(record.final_train_loss, record.train_loss[0]))),
        np.log(of(lambda record: record.final_test_loss)),
        np.log(of(curve)),
        examples,
        of(lambda record: record.seconds),
    )
