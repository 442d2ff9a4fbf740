"""Second moments that are estimated instead of computed: what they do to the loss, and what they save."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding, notes
from experiments.laboratory.schemas import ContestConfig

EXACT = "exact"
CLOSE = 1.05  # of the loss of the exact one


class Estimators(ContestStudy[ContestConfig]):
    title = "Estimated second moments"
    question = "What does it cost in loss to estimate the second moment of examples, and what does it save in time?"
    source = (
        "Open: what attach(..., statistics_dtype=, every=, fraction=, engine='random_sign') estimate without bias; "
        "micro-batches: Wang & Aitchison 2024"
    )

    def required(self) -> Sequence[str]:
        return (EXACT,)

    def findings(self, found: Contest) -> list[Finding]:
        sizes = found.settings.batch_sizes
        others = [label for label in found.labels if label != EXACT]
        return [
            *(_close(found, label, B) for label in others for B in sizes),
            *notes([_seconds(found, others, B) for B in sizes]),
        ]


def _close(found: Contest, label: str, B: int) -> Finding:
    ratio, equal_time = found.ratio(label, EXACT, B), found.at_equal_seconds(label, EXACT, B)
    return Finding(
        f"B = {B}: {label}: the loss is at most {CLOSE:g} times that with the exact second moment",
        ratio.verdict(CLOSE),
        f"Training loss {found.loss(label, B)} against {found.loss(EXACT, B)}: a ratio of {ratio} at equal examples, "
        f"and of {equal_time} at equal wall-clock.",
    )


def _seconds(found: Contest, labels: Sequence[str], B: int) -> str:
    told = ", ".join(f"{label} {found.time_ratio(label, EXACT, B)}" for label in labels)
    return f"At B = {B} runs take, in units of the exact one's {found.seconds(EXACT, B):.2f} s: {told}."


STUDY = Estimators
