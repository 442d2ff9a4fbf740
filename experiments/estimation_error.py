"""How far the averaged second moment at a reference batch size is from the truth, where the truth is known.

The parameters stay where they are. The gradients of all training examples are a population with exact mean mu and
variance sigma^2 of every element; batches are drawn from it with replacement, and the optimizer's own equations
average them. The error is that of ln s against ln(mu^2 + sigma^2/R), since Adam divides by the root of s.

python -m experiments.estimation_error --document docs/optimizers.md     seconds; the error of random signs in one batch
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import gradstats
from experiments.benchmarks.machine import machine
from experiments.config import compose_config
from experiments.data import load_data
from experiments.documents import Cell, Table, fill_document, markdown
from experiments.errors import UserError, command_line
from experiments.models import build_model
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


# Engine "random_sign", of one batch


def sign_error(model: nn.Module, x: Tensor, y: Tensor, probes: int, draws: int) -> tuple[float, float]:
    """||q^ - q|| / ||q|| of the second moment, root mean square over `draws` of the signs; and as
    gradstats/engines/contrasts.py has it, by the deviations d (B, P) of the examples, three at least."""
    g = population("", model, x, y).gradients
    d = (g - g.mean(0)) / math.sqrt(len(g))  # q is D^ of these, and what does not vary
    q = g.square().mean(0)
    n = 2 ** (len(g) - 1).bit_length()
    k = min(probes, n - 1)  # more tell nothing new
    of_one = ((n * n - 3 * n + 3) * d.square().sum(0) ** 2 - n * (n - 1) * d.pow(4).sum(0)) * 2 / (n * (n - 3))
    variance = of_one * (n - 1 - k) / (k * (n - 2))
    exact = gradstats.compute(model, F.cross_entropy, x, y).second_moment
    squares = 0.0
    with gradstats.attach(model, engine="random_sign", probes=probes) as stats:
        for _ in range(draws):
            model.zero_grad()
            stats.backward(F.cross_entropy(model(x), y, reduction="none"))
            squares += sum(float((stats.second_moment[name] - exact[name]).square().sum()) for name in exact)
    model.zero_grad()
    norm = float(q.square().sum())
    return math.sqrt(squares / draws / norm), math.sqrt(float(variance.sum()) / norm)


def sign_table(batch_size: int, probes: Sequence[int], draws: int) -> Table:
    config = compose_config(["tracker=none", "directory=none"])
    data = load_data(config.data, torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model, data.shape, data.classes).eval()
    x, y = data.train.x[:batch_size], data.train.y[:batch_size]
    rows: list[list[Cell]] = []
    for k in probes:
        measured, expected = sign_error(model, x, y, k, draws)
        rows.append([str(k), f"{measured:.3f}", f"{expected:.3f}"])
    about = (
        f"||q^ - q|| / ||q|| of the second moment of one batch of the digits, B = {batch_size}, at the initial "
        f"parameters; root mean square over {draws} draws of the signs."
    )
    columns = ["probes k", "measured", "by the formula"]
    return Table("The relative error of random signs", about, columns, rows, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--probes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--document", type=Path, help="a file to write the table into, between its markers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with command_line("interrupted: nothing was written"):
        if arguments.batch_size < 3 or min(arguments.probes) < 1:
            raise UserError("--batch-size, --probes: the formula is for three examples at least, and one probe")
        written = sign_table(arguments.batch_size, arguments.probes, arguments.draws)
        Console().print(written.rich())
        if arguments.document is not None:
            about = ", ".join(f"{key} {value}" for key, value in machine(1).items())
            fill_document(arguments.document, "random_sign", f"{markdown(written)}\n\n{about}.")


if __name__ == "__main__":
    main()
