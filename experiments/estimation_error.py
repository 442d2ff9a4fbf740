"""How far the averaged second moment at a reference batch size is from the truth, where the truth is known.

The parameters stay where they are. The gradients of all training examples are a population with exact mean mu and
variance sigma^2 of every element; batches are drawn from it with replacement, and the optimizer's own equations
average them. The error is that of ln s against ln(mu^2 + sigma^2/R), since Adam divides by the root of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradstats
from gradstats.optim import BatchInvariantAdam
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import ESTIMATORS
from gradstats.optim.parts import Age
from gradstats.optim.update import Values


@dataclass(frozen=True)
class Population:
    """Gradients of all examples at fixed parameters, (N, P), without elements that no example moves."""

    name: str
    gradients: Tensor

    @property
    def mean(self) -> Tensor:
        return self.gradients.mean(0)

    def truth(self, r: float) -> Tensor:
        """mu^2 + sigma^2/R (P,)."""
        return self.mean.square() + self.gradients.var(0, correction=0) / r

    def batches(self, seeds: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """m and q of one batch for each seed, (seeds, P)."""
        drawn = torch.randint(len(self.gradients), (seeds, batch_size), generator=generator)
        g = self.gradients[drawn]
        return g.mean(1), g.square().mean(1)


def population(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Population:
    g = gradstats.per_example_gradients(model, F.cross_entropy, x, y)
    flat = torch.cat([t.flatten(1) for t in g.values()], dim=1)
    return Population(name, flat[:, flat.any(0)])


@dataclass(frozen=True)
class Error:
    """Of ln s, one value a seed: mean over elements, root mean square, and the share of elements at the floor."""

    population: str
    reference_batch_size: float
    batch_size: int
    estimator: str
    examples: int
    bias: list[float]
    rms: list[float]
    floored: list[float]


@dataclass
class Average:
    """What one optimizer keeps of a stream of batches."""

    optimizer: BatchInvariantAdam
    update: AdamUpdate
    buffers: dict[str, Tensor]

    @classmethod
    def zero(cls, like: Tensor, b: int, options: dict[str, Any]) -> Average:
        optimizer = BatchInvariantAdam([like], **options)
        update = optimizer.update(optimizer.param_groups[0], b, {})
        return cls(optimizer, update, {name: torch.zeros_like(like) for name in update.buffers})

    def scalars(self, b: int, examples: int) -> Values:
        age = Age(b, examples, tuple((name, examples) for name in self.update.younger))
        return Values(self.optimizer.scalars(self.optimizer.param_groups[0], age, self.update))

    def add(self, m: Tensor, q: Tensor, b: int, examples: int) -> None:
        x = Values(self.buffers | {"m": m, "second_moment": q})
        self.buffers |= self.update.averages(x, self.scalars(b, examples))

    def second_moment(self, b: int, examples: int) -> Tensor:
        """s as the step divides by."""
        x, k = Values(self.buffers), self.scalars(b, examples)
        return self.update.moment.floor(x.exp_avg_sq, x, k)


def coincide(r: float, b: int) -> bool:
    """Whether all estimators are v_R of the batch itself."""
    return r <= b and b > 1


def errors(
    population: Population,
    batch_size: int,
    references: Sequence[float],
    counts: Sequence[int],
    seeds: int,
    betas: tuple[float, float],
    tuned: int,
) -> list[Error]:
    """Of every estimator at every R, all of them on the same batches, after each of `counts` examples."""
    generator = torch.Generator().manual_seed(0)
    like = population.gradients.new_zeros(seeds, population.gradients.shape[1])
    common = {"betas": betas, "batch_size": tuned}
    averages = {
        (r, e): Average.zero(like, batch_size, common | {"reference_batch_size": r, "estimator": e})
        for r in references
        for e in ESTIMATORS
        if not coincide(r, batch_size)
    }
    found = []
    for examples in range(batch_size, max(counts) + 1, batch_size):
        m, q = population.batches(seeds, batch_size, generator)
        for average in averages.values():
            average.add(m, q, batch_size, examples)
        if examples not in counts:
            continue
        for (r, estimator), average in averages.items():
            s = average.second_moment(batch_size, examples)
            known = s > 0  # an element that no example has moved yet has no estimate
            error = torch.where(known, s.log() - population.truth(r).log(), 0.0)
            n = known.sum(1)
            floored = ((s > average.buffers["exp_avg_sq"]) & known).sum(1) / n
            found.append(
                Error(
                    population.name,
                    r,
                    batch_size,
                    estimator,
                    examples,
                    (error.sum(1) / n).tolist(),
                    (error.square().sum(1) / n).sqrt().tolist(),
                    floored.tolist(),
                )
            )
    return found
