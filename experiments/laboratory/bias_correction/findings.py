"""What of Adam's advantage over RMSProp is that of bias correction."""

from __future__ import annotations

from experiments.estimate import Finding, at_edge, notes
from experiments.laboratory.bias_correction.analysis import Analysis, Goal
from experiments.laboratory.bias_correction.moments import VARIANTS


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
