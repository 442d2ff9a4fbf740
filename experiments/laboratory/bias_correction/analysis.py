"""What each variant reaches when it is tuned, and what of Adam's advantage is that of bias correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.cube import cube
from experiments.documents import Cell, Table
from experiments.estimate import Array, Estimate, Finding, at_edge, notes, over_seeds
from experiments.jobs import Result
from experiments.laboratory.bias_correction.moments import VARIANTS


@dataclass(frozen=True)
class Goal:
    """point: of the learning curve; warmups: how many of the grid may be chosen from, the first of which is none."""

    label: str
    point: int
    warmups: int


@dataclass(frozen=True)
class Analysis:
    """log_loss: ln of the training loss (S, V, W, K, T): seed, variant, warm-up, learning rate, point of the curve."""

    log_loss: Array
    warmups: tuple[float, ...]
    lrs: tuple[float, ...]
    counts: tuple[int, ...]
    goals: tuple[Goal, ...]

    def at(self, goal: Goal) -> Array:
        """ln loss (S, V, W, K), of the warm-ups that may be chosen."""
        rows: Array = self.log_loss[:, :, : goal.warmups, :, goal.point]
        return rows

    def chosen(self, variant: str, goal: Goal) -> tuple[int, int]:
        """Warm-up and learning rate, as indices."""
        grid = self.at(goal)[:, ROW[variant]].mean(0)
        warmup, lr = np.unravel_index(grid.argmin(), grid.shape)
        return int(warmup), int(lr)

    def loss(self, variant: str, goal: Goal) -> Estimate:
        return over_seeds(self.at(goal)[:, ROW[variant]], lambda rows: float(np.exp(rows.mean(0).min())))

    def ratio(self, variant: str, other: str, goal: Goal) -> Estimate:
        """Loss of the one over that of the other."""

        def quotient(rows: Array) -> float:
            mine, others = tuned(rows, variant, other)
            return float(np.exp(mine - others))

        return over_seeds(self.at(goal), quotient)

    def unexplained(self, goal: Goal) -> Estimate:
        """Of RMSProp's ln loss above Adam's, the part that correction leaves, minus a half of the whole."""

        def difference(rows: Array) -> float:
            adam, rmsprop, corrected = tuned(rows, "adam", "rmsprop", "rmsprop_both")
            return corrected - adam - (rmsprop - adam) / 2

        return over_seeds(self.at(goal), difference)


ROW = {name: i for i, name in enumerate(VARIANTS)}


def tuned(rows: Array, *variants: str) -> tuple[float, ...]:
    """The lowest mean of ln loss over the grid, of rows (S, V, W, K); so every resample is tuned anew."""
    mean = rows.mean(0)
    return tuple(float(mean[ROW[variant]].min()) for variant in variants)


def analyse(results: Sequence[Result], early: float, counts: Sequence[int]) -> Analysis:
    """early: examples, of which the nearest count is taken. Raises ValueError unless the results are a whole grid."""
    found = cube(results, ("seed", "variant", "warmup", "lr"), np.log)
    if found.axes["variant"] != tuple(VARIANTS):
        raise ValueError(f"results of {found.axes['variant']}, not of {tuple(VARIANTS)}")
    warmups, lrs = (found.numbers(name) for name in ("warmup", "lr"))
    point = int(np.abs(np.array(counts) - early).argmin())
    goals = tuple(
        Goal(f"{when}, {how}", at, number)
        for when, at in (("Final loss", len(counts) - 1), (f"Loss after {counts[point]:,} examples", point))
        for how, number in (("no warm-up", 1), ("warm-up tuned", len(warmups)))
    )
    return Analysis(found.values, warmups, lrs, tuple(counts), goals)


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


def findings(analysis: Analysis) -> list[Finding]:
    claims = (_advantage, _explained, _needed)
    return [*(claim(analysis, goal) for goal in analysis.goals for claim in claims), *_notes(analysis)]


def _advantage(analysis: Analysis, goal: Goal) -> Finding:
    ratio = analysis.ratio("adam", "rmsprop", goal)
    return Finding(
        f"{goal.label}: Adam is better than RMSProp with momentum",
        ratio.verdict(1),
        f"Adam's is {analysis.loss('adam', goal)}, RMSProp's {analysis.loss('rmsprop', goal)}: a ratio of {ratio}.",
    )


def _explained(analysis: Analysis, goal: Goal) -> Finding:
    bar = f"{goal.label}: bias correction explains at least half of Adam's advantage over RMSProp"
    rest = analysis.ratio("rmsprop_both", "adam", goal)
    sentence = f"With both averages corrected, RMSProp's loss is {rest} times Adam's."
    if analysis.ratio("adam", "rmsprop", goal).verdict(1) != "holds":
        return Finding(bar, "cannot be judged", f"There is no clear advantage to explain. {sentence}")
    return Finding(bar, analysis.unexplained(goal).verdict(0), sentence)


def _needed(analysis: Analysis, goal: Goal) -> Finding:
    ratio = analysis.ratio("adam", "adam_none", goal)
    first, second = (analysis.ratio(name, "adam_none", goal) for name in ("adam_first", "adam_second"))
    return Finding(
        f"{goal.label}: Adam is better with bias correction than without",
        ratio.verdict(1),
        f"Corrected, its loss is {ratio} times that of Adam without. That of the mean alone makes it {first} times as "
        f"high, that of the squares alone {second} times; RMSProp's becomes "
        f"{analysis.ratio('rmsprop_both', 'rmsprop', goal)} times as high with both.",
    )


def _notes(analysis: Analysis) -> list[Finding]:
    chosen = {
        f"{variant.label} ({goal.label})": (goal, *analysis.chosen(name, goal))
        for name, variant in VARIANTS.items()
        for goal in analysis.goals
    }
    lrs = [told for told, (_, _, lr) in chosen.items() if lr in (0, len(analysis.lrs) - 1)]
    # The first warm-up is none, and no edge.
    warmups = [told for told, (goal, warmup, _) in chosen.items() if 0 < warmup == goal.warmups - 1]
    return notes([*at_edge("lr", lrs), *at_edge("warm-up", warmups)])


def alternative(analysis: Analysis) -> str:
    goal = analysis.goals[0]
    losses = "; ".join(f"{variant.label} {analysis.loss(name, goal)}" for name, variant in VARIANTS.items())
    return f"Learning curves of all variants, and their final loss along the learning rate. {goal.label}: {losses}."


TERMS = {
    "Corrected": "Adam's averages start from zero, and are divided by 1 - beta^t to make up for it. To leave this out "
    "is to multiply the learning rate by 1 - beta_1^t, for the mean, and by 1 / sqrt(1 - beta_2^t), for the "
    "squares, which falls from 32 at the first step to 1.4 at step 700 for beta_2 = 0.999.",
    "RMSProp": "With momentum, as in torch: the average is one of steps g / (sqrt(s) + eps), where Adam divides an "
    "average of gradients. Its learning rate is given as that of Adam, torch's over 1 - beta_1.",
    "Tuned": "The learning rate, and the warm-up where it says so, with the lowest geometric mean loss over seeds; the "
    "same grid for all variants.",
    "Intervals": "95% bootstrap over seeds, drawn jointly for all variants, and widened where they are few; tuning is "
    "repeated in every resample.",
    "Diverged runs": "They count with the loss of their initial model, and no loss counts for more.",
}
