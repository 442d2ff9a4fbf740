"""The tables of temperature."""

from __future__ import annotations

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import Estimate, over_seeds
from experiments.laboratory.temperature.analysis import ENSEMBLES, Analysis, expected_excesses, temperatures


def tables(found: Analysis) -> list[Table]:
    s = found.settings
    expected, heat = expected_excesses(found), temperatures(found)
    excess: list[list[Cell]] = []
    for cell in sorted(np.ndindex(heat.shape), key=lambda c: (heat[c], c)):
        measured = over_seeds(found.excess.values[(slice(None), *cell)])
        foretold = float(expected[cell])
        ratio = Estimate(measured.value / foretold, measured.low / foretold, measured.high / foretold)
        excess.append(
            [
                f"{heat[cell]:.3g}",
                f"{s.well_rates[cell[0]]:g}",
                str(s.well_batch_sizes[cell[1]]),
                measured,
                f"{foretold:.3g}",
                ratio,
            ]
        )
    tested: list[list[Cell]] = [
        [
            name,
            f"{s.lr_multipliers[found.tuned(i)]:g}",
            *(over_seeds(found.tested.values[:, found.tuned(i), i, j]) for j in (1, 2)),
        ]
        for i, name in enumerate(ENSEMBLES)
    ]
    return [
        Table(
            "Excess loss on the data",
            "Of softmax regression at a constant learning rate, above the loss at the minimum, and what Hessian and "
            "gradient noise at the minimum foretell.",
            ["eta/B", "eta", "B", "excess", "foretold", "ratio"],
            excess,
            (),
        ),
        Table(
            "Snapshots of cycles against one run",
            f"On half of the test set, at the learning rate (times the method's own) that is best on the other half. "
            f"Ensembles have {s.members} members.",
            ["model", "lr", "test loss", "test accuracy"],
            tested,
            (0,),
        ),
    ]


TERMS = {
    "eta/B": "The learning rate of torch's SGD over the batch size: what one example does. It is lr0, the learning "
    "rate in units of examples.",
    "Excess loss": "The loss with its penalty, of all training examples, above that at the minimum; mean over a run "
    "that has forgotten its start. Batches are drawn with replacement, as theory has it.",
    "Distance": "In function space: total variation between the predicted distributions of two models, mean over the "
    "test set. 0 is the same prediction everywhere, 1 none in common.",
}
