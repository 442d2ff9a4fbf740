"""What the groups are and where they ended, as tables, and what can be said of the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.documents import Cell, Table
from experiments.estimate import Finding, over_seeds
from experiments.pages.groups import ABSENT, Collection, Group, shown, states

FINAL = {
    "loss/train": "final training loss",
    "loss/test": "final test loss",
    "accuracy/test": "final test accuracy (%)",
}
# Differences of n seeds have one sign, and their interval one side of zero, by chance in 2 of 2^n cases: one in 16.
FEWEST_SEEDS = 5
AUGMENTATION = ("data.crop", "data.flip")  # losses are those of the images as they are
ROUNDING = 1e-5  # of a loss: two methods that are one in theory differ by less


def final_values(collection: Collection, groups: Sequence[Group]) -> Table:
    """Of some of the groups; the best of all is emphasised."""
    several = any(len(group.runs) > 1 for group in groups)
    explanation = "Of runs that have ended."
    if several:
        explanation = "Means over the seeds that have ended, with 95% bootstrap intervals over them."
    if any(run.status == "diverged" for run in collection.runs):
        explanation += " A run that diverged counts with the values of its initial model."
    if collection.repeated:
        explanation += f" Left out: {collection.repeated} runs with the configuration and seed of another."
    best = ranked(collection)[:1] if len(collection.groups) > 1 and not other_data(collection) else []
    if best:
        explanation += " Bold: the lowest final training loss."
    rows: list[list[Cell]] = [
        [
            group.label or "all",
            states(group.runs),
            *(group.final(metric) for metric in FINAL),
            _seconds(group),
        ]
        for group in groups
    ]
    emphasised = tuple(i for i, group in enumerate(groups) if group in best)
    return Table("Final values", explanation, ["group", "seeds", *FINAL.values(), "seconds a run"], rows, emphasised)


def differences(collection: Collection) -> Table:
    """Of the configurations of groups: a row a group, a column a key on which any two of them differ."""
    rows: list[list[Cell]] = [
        [group.label, *(shown(group.settings.get(key, ABSENT)) for key in collection.differing)]
        for group in collection.groups
    ]
    explanation = "All keys on which the groups differ. A dash: the group has no such key."
    return Table("Differences", explanation, ["group", *collection.differing], rows, ())


def ranked(collection: Collection) -> list[Group]:
    """By their mean final training loss, those left out of which no run has ended."""
    loss = {group.key: group.mean("loss/train") for group in collection.groups}
    ended = [group for group in collection.groups if np.isfinite(loss[group.key])]
    return sorted(ended, key=lambda group: loss[group.key])


def other_data(collection: Collection) -> list[str]:
    """Keys in which the groups differ, and with which a loss is another quantity."""
    return [key for key in collection.differing if key.startswith("data.") and key not in AUGMENTATION]


def findings(collection: Collection) -> list[Finding]:
    """Whether the group with the lowest final training loss can be told from the next; how many runs are not whole."""
    found = []
    if others := other_data(collection):
        told = f"The groups differ in {', '.join(others)}, and their losses are not compared: they are of other data."
        found.append(Finding("", None, told))
    elif len(first := ranked(collection)[:2]) == 2:
        found.append(_best(*first))
    for state, told in (
        ("diverged", "diverged: they count with the values of their initial model"),
        ("unfinished", "have not ended: they have curves, and no final values"),
    ):
        if count := sum(run.status == state for run in collection.runs):
            found.append(Finding("", None, f"{count} of {len(collection.runs)} runs {told}."))
    return found


def _best(best: Group, second: Group) -> Finding:
    """On the seeds that both have: runs of one seed share initial model and order of examples."""
    bar = "The lowest final training loss is lower than the next by more than seeds explain"
    ours, theirs = ({run.seed: run.final("loss/train") for run in group.runs} for group in (best, second))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    differences = np.array([pair for pair in pairs if np.isfinite(pair)])
    lowest, next_one = (group.final("loss/train") for group in (best, second))
    sentence = f"It is {lowest}, of {best.label}; the next is {next_one}, of {second.label}."
    if len(differences) < FEWEST_SEEDS:
        return Finding(
            bar,
            "cannot be judged",
            f"{sentence} They have {len(differences)} seeds in common, and {FEWEST_SEEDS} can tell.",
        )
    difference = over_seeds(differences)
    return Finding(
        bar,
        # It is the lower one by choice: that it is not lower cannot come out, only that nobody can tell.
        "holds" if difference.high < -ROUNDING * second.mean("loss/train") else "cannot be judged",
        f"{sentence} Over the {len(differences)} seeds that both have, the difference is {difference}.",
    )


def _seconds(group: Group) -> Cell:
    seconds = [run.record.seconds for run in group.runs if run.record is not None]
    return f"{np.mean(seconds):.1f}" if seconds else ABSENT
