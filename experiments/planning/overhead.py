"""Expected time of forward and backward with statistics, over the plain step's: estimated from measured prices.

A form's price is the time that its statistics take beside the gradient, in units of the time that the plain step has
for as many FLOPs as the gradient has:

    overhead = 1 + sum over layers of price(form) F_gradient / F_step

    Outer, ConvolutionWeight    a number
    OuterSum                    a + b / t: what is formed is squared once an example, and takes t positions of matmul
    Rows, Dense                 0: they have no matmul

Where most of a step is looking up a table that is much larger than the batch, as in the benchmark's "embedding", time
goes into the memory of the sums: 10.8 times the plain step's was recorded where this gives 1.2.

The numbers come from docs/benchmark.json, the newest run on a CPU, and from workloads that have one form alone; a price
below 0 says that our kernel is faster than torch's matmul was on that machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from experiments.benchmarks import record
from experiments.benchmarks.report import Run
from experiments.benchmarks.workloads import WORKLOADS, Problem, Settings
from experiments.errors import UserError
from experiments.planning.layers import Layer, price
from experiments.planning.trace import Step, plain
from experiments.planning.work import Work

GATHERED = "ours-second_moment"
OF_FORM = {"Outer": ("mlp",), "OuterSum": ("linear_t4", "linear_t16"), "ConvolutionWeight": ("resnet18",)}


@dataclass(frozen=True)
class Price:
    """a + b / t, of the gradient's time."""

    a: float
    b: float = 0.0

    def of(self, one: Work) -> float:
        return (self.a + self.b / one.positions) * one.gradient


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
    """Of a step that gathers the second moment to the plain one."""
    found = [r.ratio for r in run.rows if (r.workload, r.contestant) == (workload, GATHERED)]
    if not found or found[0] is None:
        raise UserError(f"{record.RECORD} has no time of {GATHERED} on {workload}: python -m experiments.benchmark")
    return found[0]


@cache
def prices() -> Prices:
    """Called under FakeTensorMode. Raises: UserError if nothing is recorded."""
    run, of_form = measured(), {}
    for form, workloads in OF_FORM.items():
        points = [point(form, workload, ratio(run, workload)) for workload in workloads]
        (at, first), (then, last) = points[0], points[-1]
        b = (first - last) / (at - then) if len(points) > 1 else 0.0
        of_form[form] = Price(first - b * at, b)
    about = run.about
    return Prices(of_form, f"{about['processor']}, {about['threads']} threads, {about['dtype']}, {run.date}")


def point(form: str, workload: str, ratio: float) -> tuple[float, float]:
    """1/t of the workload's layers of that form, and the price that explains the ratio."""
    step, layers = traced(workload)
    works = [one for layer in layers for one in layer.works if one.form == form]
    return 1 / works[0].positions, (ratio - 1) * step.flops / sum(one.gradient for one in works)


def traced(workload: str) -> tuple[Step, list[Layer]]:
    problem = WORKLOADS[workload].problem(Settings())
    step = plain(problem.model, forward(problem))
    return step, price(step.calls, ["sum_of_squares"])


def forward(problem: Problem) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        return problem.losses_of(problem.model, problem.x, problem.y).mean()

    return loss
