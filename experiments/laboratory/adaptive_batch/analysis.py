"""What the contenders reach, each tuned for itself: at equal examples, seconds and steps; and how batches grew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, Rows, geometric_mean, over_rows, over_seeds
from experiments.jobs import Result
from experiments.laboratory.adaptive_batch.contenders import DECAYS, KEPT, STEP, Contender, contenders, fixed
from experiments.laboratory.schemas import AdaptiveBatchConfig

GROWING = (KEPT, STEP)
PRICES = ("seconds", "steps")


@dataclass(frozen=True)
class Tuned:
    """ln of the final losses (S, L) at learning rates, ascending, over so many examples."""

    examples: int
    rates: Array
    train: Array
    test: Array

    def best(self, rows: Rows) -> int:
        """The position of the learning rate with the lowest training loss."""
        return int(self.train[rows].mean(axis=0).argmin())

    def log_loss(self, rows: Rows, held_out: bool = False) -> float:
        """At the learning rate that these seeds tune."""
        return float((self.test if held_out else self.train)[rows, self.best(rows)].mean())

    def loss(self, held_out: bool = False) -> Estimate:
        return over_rows(len(self.train), lambda rows: self.log_loss(rows, held_out)).exp()

    @property
    def everyone(self) -> Rows:
        return np.arange(len(self.train))

    @property
    def lr(self) -> float:
        return float(self.rates[self.best(self.everyone)])

    @property
    def at_edge(self) -> bool:
        return self.best(self.everyone) in (0, len(self.rates) - 1)


@dataclass(frozen=True)
class Race:
    """Of a contender at its tuned learning rate, at counts of examples: ln of losses, steps, seconds, batch size and
    noise scale (not a number where it is not known), all (S, T)."""

    train: Array
    test: Array
    steps: Array
    seconds: Array
    size: Array
    noise: Array


@dataclass(frozen=True)
class Analysis:
    """limited: by PRICES, growing contender and one that decays, the latter tuned anew over the examples that cost as
    much as the former's run, in the median over seeds."""

    settings: AdaptiveBatchConfig
    counts: list[int]
    races: dict[str, Race]
    tuned: dict[str, Tuned]
    limited: dict[tuple[str, str, str], Tuned]

    @property
    def slow(self) -> int:
        return self.settings.batch_sizes[0]

    def rival(self, B: int) -> str:
        """The better decay at a fixed batch size, by training loss at equal examples."""
        labels = [fixed(decay, B) for decay in DECAYS]
        return min(labels, key=lambda label: self.tuned[label].loss().value)

    def rival_at_equal(self, price: str, growing: str, B: int) -> str:
        labels = [fixed(decay, B) for decay in DECAYS]
        return min(labels, key=lambda label: self.limited[price, growing, label].loss().value)

    def ratio(self, label: str, other: str, held_out: bool = False) -> Estimate:
        """Of final losses at equal examples."""
        return compared(self.tuned[label], self.tuned[other], held_out)

    def ratio_at_equal(self, price: str, growing: str, other: str, held_out: bool = False) -> Estimate:
        """Where the other has as many seconds, or steps. What examples cost is measured too: with the share of every
        resample the other's loss moves along its slope, so that this uncertainty is in the interval."""
        one, limited = self.tuned[growing], self.limited[price, growing, other]
        measured = self._log_share(price, growing, other, one.everyone)

        def log_ratio(rows: Rows) -> float:
            more = self._log_share(price, growing, other, rows) - measured
            gained = more * self._slope(other, limited, rows, held_out)
            return one.log_loss(rows, held_out) - limited.log_loss(rows, held_out) - gained

        return over_rows(len(one.train), log_ratio).exp()

    def share(self, price: str, growing: str, other: str) -> Estimate:
        """Of the price of the other's run over all examples, what the growing contender's costs; a median."""
        seeds = len(self.settings.seeds)
        return over_rows(seeds, lambda rows: self._log_share(price, growing, other, rows)).exp()

    def _log_share(self, price: str, growing: str, other: str, rows: Rows) -> float:
        paid, whole = (getattr(self.races[label], price)[rows, -1] for label in (growing, other))
        return float(np.log(np.median(paid / whole)))

    def _slope(self, label: str, limited: Tuned, rows: Rows, held_out: bool) -> float:
        """d ln(loss) / d ln(examples), from this limit to the farthest from it of the counts of examples that the
        contender was tuned over; 0 if there is no other."""
        tuned = [self.tuned[label], *(one for (*_, rival), one in self.limited.items() if rival == label)]
        apart = [float(np.log(one.examples / limited.examples)) for one in tuned]
        farthest = int(np.abs(apart).argmax())
        if apart[farthest] == 0:
            return 0.0
        return (tuned[farthest].log_loss(rows, held_out) - limited.log_loss(rows, held_out)) / apart[farthest]

    def steps(self, label: str, other: str) -> Estimate:
        """Of the one, over those of the other."""
        return geometric_mean(self.races[label].steps[:, -1] / self.races[other].steps[:, -1])

    def seconds(self, label: str, other: str) -> Estimate:
        return geometric_mean(self.races[label].seconds[:, -1] / self.races[other].seconds[:, -1])

    def to_noise(self, label: str) -> Estimate:
        """Batch size over the noise scale of the moment, or the largest size where that is smaller; geometric mean over
        the second half of the looks."""
        race, half = self.races[label], len(self.counts) // 2
        # Where it is not known, no signal is seen: it is more than the largest size.
        noise = np.nan_to_num(race.noise[:, half:], nan=np.inf)
        return over_seeds(np.log(race.size[:, half:] / np.minimum(noise, self.settings.largest))).exp()


def compared(one: Tuned, other: Tuned, held_out: bool) -> Estimate:
    """Of losses, each at its tuned learning rate; tuning is repeated in every resample."""
    seeds = len(one.train)
    return over_rows(seeds, lambda rows: one.log_loss(rows, held_out) - other.log_loss(rows, held_out)).exp()


def is_tuning(result: Result) -> bool:
    return "constant_step" in result.coordinates


def raced(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if "contenders" in result.coordinates]


def of_contender(results: Sequence[Result], contender: Contender, examples: int) -> list[Result]:
    wanted = {
        "smallest": contender.smallest,
        "largest": contender.largest,
        "decay": contender.decay.value,
        "constant_step": contender.constant_step,
        "examples": examples,
    }
    return [r for r in results if is_tuning(r) and wanted.items() <= r.coordinates.items()]


def octave_of(result: Result, base: float) -> float:
    lr = result.coordinates["lr"]
    assert isinstance(lr, float)
    return round(math.log2(lr / base), 6)


def losses_of(results: Sequence[Result], contender: Contender, examples: int, base: float) -> dict[float, list[float]]:
    """Final training losses by octave from a learning rate."""
    found: dict[float, list[float]] = {}
    for result in of_contender(results, contender, examples):
        found.setdefault(octave_of(result, base), []).append(result.found["train"])
    return found


def at_equal(settings: AdaptiveBatchConfig, races: Sequence[Result], warmup: int) -> dict[tuple[str, str, str], int]:
    """By price, growing contender and one that decays: the examples for which the latter pays what the former paid for
    all, in multiples of the largest batch, and not less than twice the warm-up."""
    least = settings.largest * math.ceil(max(2 * warmup, settings.largest) / settings.largest)
    total = max(races[0].found["examples"])
    rivals = [fixed(decay, B) for B in settings.batch_sizes for decay in DECAYS]
    found = {}
    for price, growing, rival in product(PRICES, GROWING, rivals):
        paid = [[race.found["contenders"][label][price][-1] for label in (growing, rival)] for race in races]
        share = float(np.median([one / other for one, other in paid]))
        found[price, growing, rival] = max(round(share * total / settings.largest) * settings.largest, least)
    return found


def tuned_of(results: Sequence[Result], contender: Contender, examples: int, base: float) -> Tuned:
    chosen = sorted(of_contender(results, contender, examples), key=lambda result: octave_of(result, base))
    rates = sorted({base * 2 ** octave_of(result, base) for result in chosen})
    train, test = np.log(
        np.moveaxis(cube(chosen, ["seed", "lr"], lambda found: [found["train"], found["test"]]).values, -1, 0)
    )
    return Tuned(examples, np.array(rates), train, test)


def analyse(settings: AdaptiveBatchConfig, results: Sequence[Result], base: float) -> Analysis:
    """base: the method's learning rate, from which octaves count."""
    races = sorted(raced(results), key=lambda result: settings.seeds.index(int(result.coordinates["seed"] or 0)))
    everyone = contenders(settings)
    warmup = int(races[0].coordinates["warmup"] or 0)
    total = int(races[0].coordinates["examples"] or 0)

    def of(label: str, key: str) -> Array:
        rows: list[list[Any]] = [race.found["contenders"][label][key] for race in races]
        return np.array(rows, dtype=float)

    return Analysis(
        settings,
        races[0].found["examples"],
        {
            label: Race(
                np.log(of(label, "train")),
                np.log(of(label, "test")),
                *(of(label, key) for key in ("steps", "seconds", "size", "noise")),
            )
            for label in json.loads(str(races[0].coordinates["contenders"]))
        },
        {label: tuned_of(results, one, total, base) for label, one in everyone.items()},
        {
            (price, growing, rival): tuned_of(results, everyone[rival], examples, base)
            for (price, growing, rival), examples in at_equal(settings, races, warmup).items()
        },
    )
