"""Where the best learning rate lies when another hyperparameter changes: in torch's units, and in units of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from experiments.documents import Cell, Table
from experiments.errors import UserError
from experiments.estimate import Finding, notes
from experiments.jobs import Coordinate, Job, Result
from experiments.laboratory.decoupling.figure import draw
from experiments.laboratory.decoupling.maps import HeatMap, heat_map
from experiments.laboratory.schemas import DecouplingConfig
from experiments.schemas.optimizer import AdamConfig, BatchInvariantSGDConfig, OptimizerConfig
from experiments.schemas.run import Config
from experiments.study import Outcome, Study, default_optimizer
from gradstats.units import decay_of

BAR = 0.5  # octaves
UNITS = ("torch", "examples")
SIDES = {"torch": "torch", "examples": "in examples"}


@dataclass(frozen=True)
class Axis:
    """methods: torch's, and that in units of examples; members of the group `optimizer`."""

    label: str
    methods: tuple[str, str]


AXES = {
    "batch_size": Axis("batch size B", ("adam", "batch_invariant_adam_r1")),
    "momentum_horizon": Axis("horizon of SGD's momentum, N_g", ("batch_invariant_sgd", "batch_invariant_sgd_debiased")),
    "gradient_horizon": Axis("horizon of Adam's mean, N_g", ("adam", "batch_invariant_adam_r1")),
    "square_horizon": Axis("horizon of Adam's squares, N_s", ("adam", "batch_invariant_adam_r1")),
    "eps": Axis("Adam's eps", ("adam", "batch_invariant_adam_slides")),
}


class Decoupling(Study[DecouplingConfig]):
    title = "Decoupled hyperparameters"
    question = "Does the best learning rate stay when the batch size, a horizon or eps changes?"
    source = (
        "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: in units of examples the learning rate lr0 is decoupled "
        "from B, N_g, N_s and eps"
    )

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
        maps = {axis: {units: heat_map(results, axis, units) for units in UNITS} for axis in AXES}
        labels = {axis: AXES[axis].label for axis in AXES}
        return Outcome(
            tables=tables(maps),
            findings=[*(finding(axis, **maps[axis]) for axis in AXES), *_notes(maps, results)],
            draw=lambda theme: draw(labels, maps, theme),
            caption=(
                "Final training loss over the learning rate and another hyperparameter, geometric mean over "
                f"{len(self.settings.seeds)} seeds, one scale for all. Left: torch's optimizers; right: in units of "
                "examples. Points: the best learning rate, by a parabola around the lowest cell; "
                "bars are 95% intervals over seeds. Where the points stand one above the other, the learning rate "
                "need not be tuned again."
            ),
            alternative=f"{2 * len(AXES)} heat maps of the final training loss. "
            + " ".join(
                f"{AXES[axis].label}: the best learning rate moves over {pair['torch'].drift} octaves in torch's "
                f"units, over {pair['examples'].drift} in units of examples."
                for axis, pair in maps.items()
            ),
            terms=TERMS,
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


def tables(maps: dict[str, dict[str, HeatMap]]) -> list[Table]:
    rows: list[list[Cell]] = []
    best: list[list[Cell]] = []
    for axis, pair in maps.items():
        for units, found in pair.items():
            name = f"{AXES[axis].label}, {SIDES[units]}"
            rows.append([name, found.drift, found.slope])
            best += [[name, f"{value:g}", lr] for value, lr in zip(found.values, found.best_lr, strict=True)]
    return [
        Table(
            title="Drift of the best learning rate",
            explanation="Drift: octaves between the largest and the smallest best learning rate. Slope: octaves an "
            "octave of the other hyperparameter, 0 where the learning rate is decoupled from it.",
            columns=["Hyperparameter, units", "Drift (octaves)", "Slope"],
            rows=rows,
            emphasised=tuple(range(1, len(rows), 2)),
        ),
        Table(
            title="Best learning rates",
            explanation="Of a step in torch's units, of an example in the others; horizons are in examples in both.",
            columns=["Hyperparameter, units", "Value", "Best learning rate"],
            rows=best,
            emphasised=(),
        ),
    ]


def finding(axis: str, torch: HeatMap, examples: HeatMap) -> Finding:
    factor = f"a factor {examples.values[-1] / examples.values[0]:g} in {AXES[axis].label}"
    verdict = examples.drift.verdict(BAR)
    if examples.edges and verdict == "holds":  # an optimum beyond the grid can only lie further away
        verdict = "cannot be judged"
    return Finding(
        f"The best lr0 drifts by at most {BAR:g} octaves over {factor}",
        verdict,
        f"In units of examples the best learning rate moves over {examples.drift} octaves (slope {examples.slope}); in "
        f"torch's units over {torch.drift} (slope {torch.slope}). {largest_move(examples)}",
    )


def largest_move(found: HeatMap) -> str:
    """Where a drift comes from one end of the axis, this says so."""
    moves = np.diff(np.log2([lr.value for lr in found.best_lr]))
    at = int(np.abs(moves).argmax())
    return (
        f"Its largest move between neighbours, by {moves[at]:+.2f} octaves, is from {found.values[at]:g} to "
        f"{found.values[at + 1]:g}."
    )


def _notes(maps: dict[str, dict[str, HeatMap]], results: Sequence[Result]) -> list[Finding]:
    told = [
        f"{AXES[axis].label}, {units}: at {', '.join(f'{value:g}' for value in found.edges)} the best learning rate is "
        "at an edge of the grid, and the drift may be larger."
        for axis, pair in maps.items()
        for units, found in pair.items()
        if found.edges
    ]
    if diverged := sum(result.found.status == "diverged" for result in results):
        told.append(f"{diverged} of {len(results)} runs diverged, and count with the loss of their initial model.")
    return notes(told)


TERMS = {
    "In torch's units": "Adam and SGD as in torch.optim: a learning rate a step, horizons in steps (here given in "
    "examples), Adam's squares those of batch means. SGD's momentum is v <- beta v + g.",
    "In units of examples": "A learning rate lr0 an example, a step of B lr0; horizons in examples; momentum a mean of "
    "gradients; Adam's squares those of examples (R = 1); eps as in B lr0 m~ / (1 + sqrt(s)/eps).",
    "Intervals": "95% bootstrap over seeds, widened where they are few; the optimum is found again in every resample.",
    "Diverged runs": "They count with the loss of their initial model, and no loss counts for more.",
}

STUDY = Decoupling
