"""What Adam divides by: the second moment at any reference batch size R, the variance, or what ordinary Adam takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding, Rows, Verdict, notes
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.verdicts import equals

CLASSIC, VARIANCE, SMALLEST, LARGEST = "squared batch mean", "variance", "R = 1", "R = inf"
AS_GOOD = 1.05  # of a loss, above which a method is worse
EARLY = 0.25  # of the run


class Preconditioner(ContestStudy[ContestConfig]):
    title = "What Adam divides by"
    question = "Which reference batch size R trains best, and is invariance to the batch size paid for in quality?"
    source = "Roulet & Agarwala, arXiv:2510.00236: the squared mean preconditions better than the second moment"

    def required(self) -> Sequence[str]:
        return (CLASSIC, VARIANCE, SMALLEST, LARGEST)

    def findings(self, found: Contest) -> list[Finding]:
        sizes, claims = found.settings.batch_sizes, (_mean, _price, _variance, _stable, _drifts)
        return [*(claim(found, B) for claim in claims for B in sizes), *notes([_best(found, B) for B in sizes])]


def references(found: Contest) -> list[str]:
    """Those of the family mu^2 + sigma^2/R, by rising R."""
    return [label for label in found.labels if label.startswith("R = ")]


def _mean(found: Contest, B: int) -> Finding:
    ratio = found.ratio(LARGEST, SMALLEST, B)
    return Finding(
        f"B = {B}: the squared mean (R = inf) trains better than the second moment of examples (R = 1)",
        ratio.verdict(1),
        f"{found.compared(LARGEST, SMALLEST, B)}.",
    )


def _price(found: Contest, B: int) -> Finding:
    ratio = found.ratio(SMALLEST, CLASSIC, B)
    return Finding(
        f"B = {B}: invariance is free: the loss of R = 1 is at most {AS_GOOD:g} times ordinary Adam's",
        ratio.verdict(AS_GOOD),
        f"{found.compared(SMALLEST, CLASSIC, B)}; held out {found.held_out(SMALLEST, B)} against "
        f"{found.held_out(CLASSIC, B)}.",
    )


def _variance(found: Contest, B: int) -> Finding:
    ratio = found.ratio(VARIANCE, SMALLEST, B)
    return Finding(
        f"B = {B}: the variance alone trains like the second moment of examples, within {AS_GOOD - 1:.0%}",
        equals(ratio, AS_GOOD - 1),
        f"{found.compared(VARIANCE, SMALLEST, B)}.",
    )


def _stable(found: Contest, B: int) -> Finding:
    """What bounds a step from below by sigma^2 bears a longer one."""
    small, large = found.doubled(SMALLEST, B), found.doubled(LARGEST, B)

    def more(rows: Rows) -> float:
        return found.log_doubled(SMALLEST, B, rows) - found.log_doubled(LARGEST, B, rows)

    return Finding(
        f"B = {B}: R = 1 is less sensitive than R = inf to twice the tuned learning rate",
        found.over(more).verdict(0),
        f"It makes the training loss {small} times as high, that of R = inf {large} times.",
    )


def _at(found: Contest, label: str, B: int, rows: Rows, point: int) -> float:
    """ln training loss at a point of the curve, tuned for that point."""
    runs = found.runs[label, B]
    return float(runs.curve[rows, runs.tuned(rows, point), point].mean())


def _early_point(found: Contest, B: int) -> int:
    """The last that all have before a quarter of the run."""
    counts = found.runs[references(found)[0], B].examples
    return max(i for i, count in enumerate(counts) if count <= EARLY * counts[-1])


def _drifts(found: Contest, B: int) -> Finding:
    labels, point = references(found), _early_point(found, B)

    def best(rows: Rows, at: int) -> int:
        return int(np.argmin([_at(found, label, B, rows, at) for label in labels]))

    def moved(rows: Rows) -> float:
        return best(rows, -1) - best(rows, point)

    steps = found.over(moved)
    early, late = (labels[best(found.everyone, at)] for at in (point, -1))
    verdict: Verdict = "holds" if steps.low > 0 or steps.high < 0 else "cannot be judged"
    if steps.low == steps.high == 0:
        verdict = "does not hold"
    return Finding(
        f"B = {B}: the best R drifts during training",
        verdict,
        f"After {EARLY:.0%} of the examples {early} is best, at the end {late}, each with its learning rate tuned for "
        f"that moment: {steps} places along {', '.join(labels)}.",
    )


def _best(found: Contest, B: int) -> str:
    ranked = sorted(references(found), key=lambda label: found.log_loss(label, B, found.everyone))
    told = ", ".join(f"{label} {found.loss(label, B)}" for label in ranked)
    return f"At B = {B} training losses are, from the best: {told}; {CLASSIC} {found.loss(CLASSIC, B)}."


STUDY = Preconditioner
