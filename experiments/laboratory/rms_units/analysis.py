"""What other units do to each step: exactly, step for step, and to the final loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, Finding, Verdict, at_edge, notes, over_seeds
from experiments.jobs import Result

EXPONENTS = (0.5, 1.0)
LABELS = {0.5: "g/sigma", 1.0: "g/sigma^2"}
UNITS = ("original", "weights", "loss")
UNIT_LABELS = {
    "original": "original units",
    "weights": "other units of the weights",
    "loss": "another unit of the loss",
}

# Rounding in float64, amplified along the training, stays far below; another step moves predictions by their own size.
EXACT = 1e-6


@dataclass(frozen=True)
class Analysis:
    """log_loss: ln of the final loss (S, X, U, K, F): seed, exponent, units, learning rate in octaves from the
    configuration's, floor; lrs: (X, K).

    deviation: of predictions from those in the original units, by exponent, units, and whether the floor follows the
    units: (S, T), at each of `steps`.
    """

    log_loss: Array
    lrs: Array
    floors: tuple[float, ...]
    deviation: dict[tuple[float, str, bool], Array]
    steps: tuple[int, ...]

    def chosen(self, exponent: float, units: str) -> tuple[int, int]:
        """Learning rate and floor, as indices."""
        return best(self.log_loss, exponent, units)

    def loss(self, exponent: float, units: str, tuned_in: str) -> Estimate:
        """Final loss in some units, at the values tuned in the same or others."""
        return over_seeds(self.log_loss, lambda rows: float(np.exp(at(rows, exponent, units, tuned_in))))

    def price(self, exponent: float, units: str) -> Estimate:
        """Final loss in these units, at the values tuned in the original ones, over that in the original ones."""
        return over_seeds(self.log_loss, lambda rows: float(np.exp(log_price(rows, exponent, units))))

    def ratio(self, units: str) -> Estimate:
        """Final loss of g/sigma^2 over that of g/sigma, each tuned in these units."""
        return over_seeds(
            self.log_loss, lambda rows: float(np.exp(at(rows, 1.0, units, units) - at(rows, 0.5, units, units)))
        )

    def largest(self, exponent: float, units: str, floor_in_units: bool) -> float:
        """Deviation, over seeds and steps."""
        return float(self.deviation[exponent, units, floor_in_units].max())


def best(rows: Array, exponent: float, units: str) -> tuple[int, int]:
    grid = rows[:, EXPONENTS.index(exponent), UNITS.index(units)].mean(0)
    lr, floor = np.unravel_index(grid.argmin(), grid.shape)
    return int(lr), int(floor)


def at(rows: Array, exponent: float, units: str, tuned_in: str) -> float:
    """Mean of ln loss (S, X, U, K, F) over seeds; so every resample is tuned anew."""
    lr, floor = best(rows, exponent, tuned_in)
    return float(rows[:, EXPONENTS.index(exponent), UNITS.index(units), lr, floor].mean())


def log_price(rows: Array, exponent: float, units: str) -> float:
    """What other units add to the mean of ln loss, at the values tuned in the original ones."""
    return at(rows, exponent, units, "original") - at(rows, exponent, "original", "original")


def analyse(results: Sequence[Result], steps: Sequence[int]) -> Analysis:
    """Raises ValueError unless the results are whole grids."""
    trained = [r for r in results if "steps" not in r.coordinates]
    compared = [r for r in results if "steps" in r.coordinates]
    # Learning rates differ between exponents, and have a grid each.
    cubes = [cube(trained, ("seed", "units", "lr", "floor"), np.log, exponent=x) for x in EXPONENTS]
    if any(c.axes["units"] != UNITS for c in cubes) or len({c.values.shape for c in cubes}) > 1:
        raise ValueError(f"results are no grid of {EXPONENTS} and {UNITS}")
    deviation = {
        (x, units, follows): cube(compared, ("seed",), np.array, exponent=x, units=units, floor_in_units=follows).values
        for x in EXPONENTS
        for units in UNITS[1:]
        for follows in (True, False)
    }
    return Analysis(
        np.stack([c.values for c in cubes], axis=1),
        np.array([c.numbers("lr") for c in cubes]),
        cubes[0].numbers("floor"),
        deviation,
        tuple(steps),
    )


def tables(analysis: Analysis) -> list[Table]:
    loss: list[list[Cell]] = [
        [
            LABELS[x],
            *(analysis.loss(x, units, "original") for units in UNITS),
            *(analysis.loss(x, units, units) for units in UNITS[1:]),
        ]
        for x in EXPONENTS
    ]
    moved: list[list[Cell]] = [
        [
            f"{LABELS[x]}, {'eps in the same units' if follows else 'eps held fixed'}",
            *(f"{analysis.largest(x, units, follows):.1e}" for units in UNITS[1:]),
        ]
        for follows in (True, False)
        for x in EXPONENTS
    ]
    return [
        Table(
            title="Final training loss",
            explanation="Geometric mean over seeds (nats), at the learning rate and floor tuned in the original units, "
            "and tuned again in the others.",
            columns=["Step", "Original", "Weights", "Loss", "Weights, tuned again", "Loss, tuned again"],
            rows=loss,
            emphasised=(1,),
        ),
        Table(
            title="Largest change of predictions",
            explanation="||f - f'|| / ||f|| of the logits of the training set, the largest over seeds and steps.",
            columns=["Step", "Other units of the weights", "Another unit of the loss"],
            rows=moved,
            emphasised=(1, 3),
        ),
    ]


def findings(analysis: Analysis) -> list[Finding]:
    return [
        _invariant(analysis, 1.0, "weights", "loss"),
        _invariant(analysis, 0.5, "loss", "weights"),
        _better(analysis),
        *(_kept(analysis, exponent, units) for exponent, units in ((1.0, "weights"), (0.5, "loss"))),
        *_notes(analysis),
    ]


def _invariant(analysis: Analysis, exponent: float, kept: str, changed: str) -> Finding:
    """The claim is of both: that the one is kept, and the other is not."""
    by_kept, by_changed = (analysis.largest(exponent, units, True) for units in (kept, changed))
    verdict: Verdict = "holds" if by_kept <= EXACT < by_changed else "does not hold"
    return Finding(
        f"Training by {LABELS[exponent]} does not depend on the unit of the {kept}, and does on that of the {changed}: "
        f"predictions change by at most {EXACT:.0e} of themselves, and by more",
        verdict,
        f"Over {analysis.steps[-1]} steps predictions differ by at most {by_kept:.1e} of themselves in "
        f"{UNIT_LABELS[kept]}, and by up to {by_changed:.1e} in {UNIT_LABELS[changed]}. With eps held fixed, where it "
        f"has a unit too, they differ by up to {analysis.largest(exponent, kept, False):.1e} in {UNIT_LABELS[kept]}.",
    )


def _better(analysis: Analysis) -> Finding:
    ratio = analysis.ratio("original")
    return Finding(
        "g/sigma^2 trains better than g/sigma, both tuned",
        ratio.verdict(1),
        f"Its final loss is {ratio} times that of g/sigma: {analysis.loss(1.0, 'original', 'original')} against "
        f"{analysis.loss(0.5, 'original', 'original')}. Tuned again in other units of the weights, it is "
        f"{analysis.ratio('weights')} times.",
    )


def _kept(analysis: Analysis, exponent: float, units: str) -> Finding:
    price = analysis.price(exponent, units)
    other = next(x for x in EXPONENTS if x != exponent)
    lower = over_seeds(analysis.log_loss, lambda rows: log_price(rows, exponent, units) - log_price(rows, other, units))
    return Finding(
        f"In {UNIT_LABELS[units]}, with the values kept, {LABELS[exponent]} loses less than {LABELS[other]}",
        lower.verdict(0),
        f"The final loss of {LABELS[exponent]} becomes {price} times as high, that of {LABELS[other]} "
        f"{analysis.price(other, units)} times; eps is held fixed, as an optimizer's is.",
    )


def _notes(analysis: Analysis) -> list[Finding]:
    cases = {(x, units): f"{LABELS[x]} in {UNIT_LABELS[units]}" for x in EXPONENTS for units in UNITS}
    lrs = [told for case, told in cases.items() if analysis.chosen(*case)[0] in (0, analysis.lrs.shape[1] - 1)]
    floors = [told for case, told in cases.items() if analysis.chosen(*case)[1] in (0, len(analysis.floors) - 1)]
    return notes([*at_edge("lr", lrs), *at_edge("floor", floors)])


def alternative(analysis: Analysis) -> str:
    moved = "; ".join(
        f"{LABELS[x]} in {UNIT_LABELS[units]}: {analysis.largest(x, units, True):.1e}"
        for x in EXPONENTS
        for units in UNITS[1:]
    )
    return (
        f"Change of predictions over steps, at most {moved}. Final loss along the learning rate, "
        f"at best {analysis.loss(0.5, 'original', 'original')} for g/sigma and "
        f"{analysis.loss(1.0, 'original', 'original')} for g/sigma^2."
    )


TERMS = {
    "g/sigma, g/sigma^2": "RMSProp's step, lr g / (sqrt(s) + eps), and lr g / (s + eps), with s a debiased average of "
    "squared gradients of batches: sigma^2 = s.",
    "Other units": "Weights: those of the first layer are divided by a factor, those of the second multiplied by it, "
    "and the layers' outputs multiplied back, so that the function is the same. Loss: it is multiplied by a factor.",
    "Floor": "eps, as a gradient: eps is the floor for g/sigma, and its square for g/sigma^2. It has the gradient's "
    "unit, so that it must change with the units for a step to stay exactly the same.",
    "Tuned": "The learning rate and floor with the lowest geometric mean loss over seeds, from grids of equal size.",
    "Intervals": "95% bootstrap over seeds, widened where they are few; tuning is repeated in every resample.",
    "Diverged runs": "They count with the loss of their initial model, and no loss counts for more.",
}
