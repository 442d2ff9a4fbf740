"""The tables of rms_units."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.laboratory.rms_units.analysis import EXPONENTS, LABELS, UNITS, Analysis


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


TERMS = {
    "g/sigma, g/sigma^2": "RMSProp's step, lr g / (sqrt(s) + eps), and lr g / (s + eps), with s a debiased average of "
    "squared gradients of batches: sigma^2 = s.",
    "Other units": "Weights: those of the first layer are divided by a factor, those of the second multiplied by it, "
    "and the layers' outputs multiplied back, so that the function is the same. Loss: it is multiplied by a factor.",
    "Floor": "eps, as a gradient: eps is the floor for g/sigma, and its square for g/sigma^2. It has the gradient's "
    "unit, so that it must change with the units for a step to stay exactly the same.",
    "Tuned": "The learning rate and floor with the lowest geometric mean loss over seeds, from grids of equal size.",
}
