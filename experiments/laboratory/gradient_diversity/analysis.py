"""Scores, similarities and diversity along the runs, by the share of wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array, Estimate, over_seeds
from experiments.jobs import Result
from experiments.laboratory.gradient_diversity.look import KINDS, SCORES
from experiments.laboratory.schemas import GradientDiversityConfig

FINDING = ("found", "twice", "area")  # how well a score finds wrong labels
NUMBERS = ("bound", "loss", "test_accuracy", "learnt", "right")


@dataclass(frozen=True)
class Analysis:
    """By share of wrong labels, arrays of (S, T): seed and moment. `pairs` are cosine similarities by kind of pair,
    `products` inner ones; `quality` has how well a score finds wrong labels, by measure and score. Not a number where
    none are wrong."""

    settings: GradientDiversityConfig
    batch_size: int
    numbers: dict[tuple[float, str], Array]
    pairs: dict[tuple[float, str], Array]
    products: dict[tuple[float, str], Array]
    quality: dict[tuple[float, str, str], Array]
    examples: tuple[int, ...]

    @property
    def early(self) -> int:
        """The moment that is called early."""
        return self.settings.epochs.index(self.settings.early)

    @property
    def shares(self) -> list[float]:
        """Of wrong labels, where there are any."""
        return self.settings.shares[1:]

    def at(self, share: float, name: str, moment: int) -> Estimate:
        return over_seeds(self.numbers[share, name][:, moment])

    def score(self, share: float, measure: str, score: str, moment: int) -> Estimate:
        return over_seeds(self.quality[share, measure, score][:, moment])

    def above(self, share: float, measure: str, first: str, second: str, moment: int) -> Estimate:
        """How much better the first score is than the second, by this measure."""
        one, other = (self.quality[share, measure, score][:, moment] for score in (first, second))
        return over_seeds(one - other)

    def cosine(self, share: float, kind: str, moment: int) -> Estimate:
        return over_seeds(self.pairs[share, kind][:, moment])


def analyse(settings: GradientDiversityConfig, results: Sequence[Result]) -> Analysis:
    """Raises ValueError unless the results are all seeds of all shares."""
    numbers: dict[tuple[float, str], Array] = {}
    pairs: dict[tuple[float, str], Array] = {}
    products: dict[tuple[float, str], Array] = {}
    quality: dict[tuple[float, str, str], Array] = {}

    def along(share: float, value: Any) -> Array:
        return cube(results, ("seed",), lambda found: [value(look) for look in found], share=share).values

    for share in settings.shares:
        for name in NUMBERS:
            numbers[share, name] = along(share, lambda look, name=name: look.get(name, np.nan))
        for kind in KINDS:
            pairs[share, kind] = along(share, lambda look, kind=kind: look["cosine"][kind])
            products[share, kind] = along(share, lambda look, kind=kind: look["product"][kind])
        for measure in FINDING if share else ():
            for score in SCORES:
                quality[share, measure, score] = along(
                    share, lambda look, measure=measure, score=score: look[measure][score]
                )
    first = results[0]
    B = first.coordinates["batch_size"]
    assert isinstance(B, int)
    return Analysis(settings, B, numbers, pairs, products, quality, tuple(look["examples"] for look in first.found))
