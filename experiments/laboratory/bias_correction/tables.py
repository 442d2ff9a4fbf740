"""The tables of bias_correction."""

from __future__ import annotations

from experiments.documents import Cell, Table
from experiments.laboratory.bias_correction.analysis import Analysis, Goal
from experiments.laboratory.bias_correction.moments import VARIANTS


def tables(analysis: Analysis) -> list[Table]:
    rows: list[list[Cell]] = [
        [variant.label, *(analysis.loss(name, goal) for goal in analysis.goals)] for name, variant in VARIANTS.items()
    ]
    tuned: list[list[Cell]] = [
        [v.label, *(_setting(analysis, name, g) for g in analysis.goals)] for name, v in VARIANTS.items()
    ]
    columns = ["Variant", *(goal.label for goal in analysis.goals)]
    return [
        Table(
            title="Training loss, tuned",
            explanation="Geometric mean over seeds (nats), each column tuned for itself, with the same grid for all.",
            columns=columns,
            rows=rows,
            emphasised=(0,),
        ),
        Table(
            title="Tuned values",
            explanation="Learning rate, and warm-up in examples.",
            columns=columns,
            rows=tuned,
            emphasised=(0,),
        ),
    ]


def _setting(analysis: Analysis, variant: str, goal: Goal) -> str:
    warmup, lr = analysis.chosen(variant, goal)
    return f"{analysis.lrs[lr]:.3g}, {analysis.warmups[warmup]:g}"


TERMS = {
    "Corrected": "Adam's averages start from zero, and are divided by 1 - beta^t to make up for it. To leave this out "
    "is to multiply the learning rate by 1 - beta_1^t, for the mean, and by 1 / sqrt(1 - beta_2^t), for the "
    "squares, which falls from 32 at the first step to 1.4 at step 700 for beta_2 = 0.999.",
    "RMSProp": "With momentum, as in torch: the average is one of steps g / (sqrt(s) + eps), where Adam divides an "
    "average of gradients. Its learning rate is given as that of Adam, torch's over 1 - beta_1.",
    "Tuned": "The learning rate, and the warm-up where it says so, with the lowest geometric mean loss over seeds; the "
    "same grid for all variants.",
}
