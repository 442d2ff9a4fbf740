"""What the runs on the quadratic and on the digits say about momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.estimate import Array
from experiments.grid import BURN_IN
from experiments.invariance.analysis import spread
from experiments.jobs import Coordinate, Result
from experiments.laboratory.quadratic import stationary_variance
from experiments.laboratory.schemas import SGDMomentumConfig
from experiments.laboratory.sgd_momentum.noisy_quadratic import METHODS, examples_to, momentum_of
from experiments.record import Record

# Scalings of the digits' methods over batch sizes, and the members of the group `optimizer`.
SCALINGS = {
    "fixed": "sgd_momentum",
    "linear": "sgd_momentum",
    "ours": "batch_invariant_sgd",
    "ours_debiased": "batch_invariant_sgd_debiased",
}
LABELS = {
    "torch": "torch",
    "dampened": "torch, dampened",
    "plain": "without momentum",
    "heavy_ball": "ours, heavy ball",
    "ewma": "ours, EWMA from zero",
    "debiased_ewma": "ours, debiased",
    "slides": "ours, min(E, N) mean",
    "fixed": "torch, lr fixed",
    "linear": "torch, lr ~ B",
    "ours": "ours, heavy ball",
    "ours_debiased": "ours, debiased",
}
UNITS = ("torch", "examples")
POSITIONS = 5  # horizons within which a batch may come, whose total effect is measured


@dataclass(frozen=True)
class Analysis:
    """First axis: seeds. On the quadratic, by method at the tuned batch size: mean (S, T) after `examples`, and
    variance; by unit, over batch sizes: time to a tenth and variance; over informative shares: `time_by_share` in
    examples and `of_average`. digits: ln(training loss) (S, B, T) by scaling and fraction of the lr, after `counts`."""

    settings: SGDMomentumConfig
    examples: Array
    mean: dict[str, Array]
    variance: dict[str, Array]
    time_by_size: dict[str, Array]
    variance_by_size: dict[str, Array]
    time_by_share: Array
    of_average: Array
    difference: Array  # (S, B)
    effect: dict[tuple[str, bool], tuple[Array, Array]]  # examples before the batch, its total effect
    lr: float
    at_edge: bool
    digits: dict[tuple[str, float], Array]
    counts: Array

    @property
    def home(self) -> int:
        return self.settings.batch_sizes.index(self.settings.tuning_batch_size)

    def time_to(self, level: float, method: str) -> Array:
        curves = [{"examples": self.examples, "mean": mean} for mean in self.mean[method]]
        return np.array([examples_to(level, curve) for curve in curves])

    def closed_form(self, unit: str) -> Array:
        """Settled variance (B,)."""
        lr, horizon, home = self.settings.lr, self.settings.horizon, self.settings.tuning_batch_size
        found = []
        for size in self.settings.batch_sizes:
            tuned = home if unit == "torch" else size
            momentum = momentum_of(horizon, tuned)
            found.append(stationary_variance(tuned * lr * (1 - momentum), 1 / size, momentum=momentum))
        return np.array(found)

    def score(self, scaling: str, fraction: float, sizes: slice = slice(None)) -> Array:
        """(S,) over the batch sizes of the slice, as batch_size_invariance has it."""
        late = self.counts >= BURN_IN * self.counts[-1]
        return spread(np.exp(self.digits[scaling, fraction][:, sizes][:, :, late]), axis=1)


def analyse(settings: SGDMomentumConfig, results: Sequence[Result]) -> Analysis:
    descents = [result for result in results if "informative" in result.coordinates]
    home = settings.tuning_batch_size

    def at_home(name: str, method: str) -> Array:
        where: dict[str, Coordinate] = {"method": method, "batch_size": home, "informative": 1.0}
        return cube(descents, ("seed",), lambda found: found[name], **where).values

    def over(axis: str, method: str, name: str | None = None, **where: float) -> Array:
        value = (lambda found: examples_to(0.1, found)) if name is None else (lambda found: found[name])
        return cube(descents, ("seed", axis), value, method=method, **where).values

    of_unit = {"torch": "torch", "examples": "heavy_ball"}
    records = [result for result in results if isinstance(result.found, Record)]
    compared = [result for result in records if result.coordinates["stage"] == "comparison"]
    counts = max((result.found.examples for result in compared), key=len)
    lr = tuned_lr(records)
    rates = [result.found.lr for result in records if result.coordinates["stage"] == "tuning"]
    return Analysis(
        settings=settings,
        examples=at_home("examples", "torch")[0],
        mean={method: at_home("mean", method) for method in METHODS},
        variance={method: at_home("variance", method) for method in METHODS},
        time_by_size={unit: over("batch_size", method, informative=1.0) for unit, method in of_unit.items()},
        variance_by_size={
            unit: over("batch_size", method, "variance", informative=1.0) for unit, method in of_unit.items()
        },
        time_by_share=over("informative", "ewma", batch_size=home),
        of_average=over("informative", "ewma", "of_average", batch_size=home),
        difference=cube(results, ("seed", "batch_size"), float, methods="torch+ewma").values,
        effect={
            (str(r.coordinates["method"]), bool(r.coordinates["mixed"])): (
                np.array(r.found["examples"]),
                np.array(r.found["effect"]),
            )
            for r in results
            if "mixed" in r.coordinates
        },
        lr=lr,
        at_edge=lr in (min(rates), max(rates)),
        digits={
            (scaling, fraction): cube(
                compared,
                ("seed", "batch_size"),
                lambda record: log_losses(record, len(counts)),
                scaling=scaling,
                fraction=fraction,
            ).values
            for scaling in SCALINGS
            for fraction in settings.lr_fractions
        },
        counts=np.array(counts, dtype=float),
    )


def tuned_lr(records: Sequence[Result]) -> float:
    """The one with the lowest ln(final training loss), mean over seeds."""
    tuning = [result for result in records if result.coordinates["stage"] == "tuning"]
    losses = cube(tuning, ("lr", "seed"), lambda record: np.log(record.final_train_loss))
    return losses.numbers("lr")[int(losses.values.mean(axis=1).argmin())]


def log_losses(record: Record, counts: int) -> list[float]:
    """At all counts of examples: from where a run diverged on, it has the loss of its initial model."""
    losses = [*record.train_loss, *[record.train_loss[0]] * (counts - len(record.train_loss))]
    return [float(np.log(loss)) for loss in losses]
