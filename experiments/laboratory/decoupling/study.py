"""Where the best learning rate lies when another hyperparameter changes: in torch's units, and in units of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

import numpy as np

from experiments.errors import UserError
from experiments.jobs import Coordinate, Job, Result
from experiments.laboratory.decoupling.analysis import AXES, UNITS, analyse
from experiments.laboratory.decoupling.figure import alternative, caption, draw
from experiments.laboratory.decoupling.findings import findings
from experiments.laboratory.decoupling.tables import TERMS, tables
from experiments.laboratory.schemas import DecouplingConfig
from experiments.laboratory.terms import DIVERGED, intervals
from experiments.schemas.optimizer import AdamConfig, BatchInvariantSGDConfig, OptimizerConfig
from experiments.schemas.run import Config
from experiments.study import OF_RUNS, Outcome, Study, default_optimizer
from gradstats.units import decay_of


class Decoupling(Study[DecouplingConfig]):
    title = "Decoupled hyperparameters"
    question = "Does the best learning rate stay when the batch size, a horizon or eps changes?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: in units of examples the learning rate lr0 is decoupled "
        "from B, N_g, N_s and eps"
    )
    reads = OF_RUNS

    def check(self) -> None:
        super().check()
        settings = self.settings
        for axis in AXES:
            values, octaves = self.values(axis), self.octaves(axis)
            if len(values) < 2 or values != sorted(values):
                raise UserError(f"study.{plural(axis)}: {values} must be two values or more, in ascending order")
            if len(octaves) < 3 or len(set(np.diff(octaves))) > 1 or octaves[0] > octaves[1]:
                raise UserError(
                    f"study.{axis}_octaves: {octaves} must be three values or more, ascending and evenly spaced"
                )
        shortest = min(settings.momentum_horizons + settings.gradient_horizons + settings.square_horizons)
        if shortest <= settings.batch_size:
            raise UserError(
                f"study.batch_size={settings.batch_size}: torch has no horizon of {shortest:g} examples, a step or less"
            )

    def values(self, axis: str) -> list[float]:
        return [float(value) for value in getattr(self.settings, plural(axis))]

    def octaves(self, axis: str) -> list[float]:
        octaves: list[float] = getattr(self.settings, f"{axis}_octaves")
        return octaves

    def jobs(self, config: Config, known: Sequence[Result]) -> list[Job]:
        runs: list[Job] = []
        for axis, units in product(AXES, UNITS):
            default = default_optimizer(AXES[axis].methods[UNITS.index(units)])
            centre = centre_lr(default, units)
            for value, octave in product(self.values(axis), self.octaves(axis)):
                lr = centre * 2**octave
                optimizer = optimizer_at(default, axis, units, value, lr, self.settings.batch_size)
                size = int(value) if axis == "batch_size" else self.settings.batch_size
                cell: dict[str, Coordinate] = {"axis": axis, "units": units, "value": value, "lr": lr}
                runs += [self.training(config, optimizer, size, seed, **cell) for seed in self.settings.seeds]
        return runs

    def outcome(self, results: Sequence[Result]) -> Outcome:
        analysis = analyse(self.settings, results)
        return Outcome(
            tables=tables(analysis),
            findings=findings(analysis),
            draw=lambda theme: draw(analysis, theme),
            caption=caption(analysis),
            alternative=alternative(analysis),
            terms=TERMS | intervals(len(self.settings.seeds), "the optimum is found again") | DIVERGED,
        )


def plural(axis: str) -> str:
    """Its key of the settings."""
    return "epsilons" if axis == "eps" else f"{axis}s"


def centre_lr(default: OptimizerConfig, units: str) -> float:
    """The middle of the grid is the configuration's own value, in units of examples an example's total effect."""
    if units == "torch":
        return default.lr
    momentum = default.momentum if isinstance(default, BatchInvariantSGDConfig) else 0.0
    return default.lr / (1 - momentum) / default.batch_size


def optimizer_at(
    default: OptimizerConfig, axis: str, units: str, value: float, lr: float, batch_size: int
) -> OptimizerConfig:
    """The default with this value; lr in the given units, and all else, are for this batch size, of which the run's
    may differ.

    torch's: beta = 1 - batch_size/N for a horizon of N examples; SGD's step is lr times the velocity v <- beta v + g;
    Adam divides by sqrt(s) + eps, s a mean of squares of batch means.
    In examples: rho = 1 - 1/N an example; SGD's step is B lr0 g~ with g~ a mean; Adam's has s a mean of squares of
    examples, and on the axis of eps it is B lr0 m~ / (1 + sqrt(s)/eps).
    """
    in_torch = units == "torch"
    tuned = dataclasses.replace(default, lr=lr if in_torch else lr * batch_size, batch_size=batch_size)
    if axis == "batch_size":
        return tuned
    if axis == "eps":
        assert isinstance(tuned, AdamConfig)
        return dataclasses.replace(tuned, eps=value)
    beta = 1 - batch_size / value if in_torch else decay_of(value) ** batch_size
    if isinstance(tuned, BatchInvariantSGDConfig):
        # The optimizer divides by 1 - momentum, whatever its average is.
        return dataclasses.replace(tuned, momentum=beta, lr=tuned.lr if in_torch else tuned.lr * (1 - beta))
    assert isinstance(tuned, AdamConfig)
    first, second = tuned.betas
    return dataclasses.replace(tuned, betas=(beta, second) if axis == "gradient_horizon" else (first, beta))


STUDY = Decoupling
