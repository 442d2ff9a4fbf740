"""Expected time of forward and backward with statistics, over the plain step's: estimated from measured prices.

A form's price is the time that its statistics take beside the gradient, in units of the time that the plain step has
for as many FLOPs as the gradient has:

    overhead = 1 + sum over layers of price(form) F_gradient / F_step

    Outer, ConvolutionWeight    a number
    OuterSum                    falls with t, since what is formed is squared once an example, and takes t positions of
                                matmul; between the t that were measured, along log t
    Rows, Dense                 0: they have no matmul

Time that is no matmul's is not in it. A step that has much of that, as of a softmax over 50,000 words, is cheaper than
is told; one whose table is much larger than its batch, as in the benchmark's "embedding", several times dearer, since
its time goes into the memory of the sums.

The numbers come from docs/benchmark.json, the newest run on a CPU, and from workloads that have one form alone; a price
below 0 says that our kernel is faster than torch's matmul was on that machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from experiments.benchmarks import record
from experiments.benchmarks.report import Run
from experiments.benchmarks.workloads import Problem, Settings, find, point
from experiments.errors import UserError
from experiments.planning.layers import Layer, price
from experiments.planning.trace import Step, plain
from experiments.planning.work import Work

GATHERED = "ours-second_moment"
OF_FORM = {
    "Outer": ("mlp",),
    # From the scale only what has as many rows, for the same matmuls, as the workloads have.
    "OuterSum": ("linear_t4", "linear_t16", *(point("scale_positions", t) for t in (64, 128, 256, 512, 1024))),
    "ConvolutionWeight": ("resnet18",),
}


@dataclass(frozen=True)
class Price:
    """Of the gradient's time, at some numbers of positions, in their order."""

    positions: tuple[int, ...]
    prices: tuple[float, ...]

    def of(self, one: Work) -> float:
        return float(np.interp(math.log(one.positions), np.log(self.positions), self.prices)) * one.gradient


@dataclass(frozen=True)
class Prices:
    """By form; `machine` is where they were measured."""

    of_form: dict[str, Price]
    machine: str

    def overhead(self, step: Step, layers: Sequence[Layer]) -> float:
        works = [one for layer in layers for one in layer.works if one.form in self.of_form]
        return 1 + sum(self.of_form[one.form].of(one) for one in works) / step.flops


def measured() -> Run:
    runs = [run for run in record.records() if run.about["device"] == "cpu"]
    if not runs:
        raise UserError(f"{record.RECORD} has no run on a CPU: python -m experiments.benchmark --record")
    return runs[-1]


def ratio(run: Run, workload: str) -> float:
    """Of a step that gathers the second moment to the plain one; of a point of a scale too."""
    found = {r.workload: r.ratio for r in run.rows if r.contestant == GATHERED}
    for g in run.growths:
        if g.contestant == GATHERED:
            found |= {point(g.scale, value): ratio for value, ratio in zip(g.values, g.ratio, strict=True)}
    if (known := found.get(workload)) is None:
        raise UserError(f"{record.RECORD} has no time of {GATHERED} on {workload}: python -m experiments.benchmark")
    return known


@cache
def prices() -> Prices:
    """Called under FakeTensorMode. Raises: UserError if nothing is recorded."""
    run = measured()
    of_form = {
        form: Price(*zip(*(priced(form, name, ratio(run, name)) for name in names), strict=True))
        for form, names in OF_FORM.items()
    }
    about = run.about
    return Prices(of_form, f"{about['processor']}, {about['threads']} threads, {about['dtype']}, {run.date}")


def priced(form: str, workload: str, ratio: float) -> tuple[int, float]:
    """The positions of the workload's layers of that form, and the price that explains the ratio."""
    step, layers = traced(workload)
    works = [one for layer in layers for one in layer.works if one.form == form]
    return works[0].positions, (ratio - 1) * step.flops / sum(one.gradient for one in works)


def traced(workload: str) -> tuple[Step, list[Layer]]:
    problem = find(workload).problem(Settings())
    step = plain(problem.model, forward(problem))
    return step, price(step.calls, ["sum_of_squares"])


def forward(problem: Problem) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        return problem.losses_of(problem.model, problem.x, problem.y).mean()

    return loss
