"""Second moments that are estimated instead of computed: what they do to the loss, and what they save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding, notes
from experiments.jobs import Result
from experiments.laboratory.schemas import ContestConfig
from experiments.schemas.run import StatisticsDtype
from experiments.study import Outcome

EXACT = "exact"
CLOSE = 1.05  # of the loss of the exact one
ROUNDED_BY = {
    "hardware": (
        "the processor's own instructions round to bfloat16, wherever they may, and no way is chosen by its speed: of "
        "its price in seconds this says nothing"
    ),
    "emulated": (
        "rounded to bfloat16 as hardware does, up to the order of addition, by a processor without instructions for "
        "it: of its price in seconds this says nothing"
    ),
    None: "nothing is rounded, since the processor has no instructions for it: this says nothing of bfloat16",
}


class Estimators(ContestStudy[ContestConfig]):
    title = "Estimated second moments"
    question = "What does it cost in loss to estimate the second moment of examples, and what does it save in time?"
    source = (
        "Open: what attach(..., statistics_dtype=, every=, fraction=, engine='random_sign') estimate without bias; "
        "micro-batches: Wang & Aitchison 2024"
    )

    def required(self) -> Sequence[str]:
        return (EXACT,)

    def outcome(self, results: Sequence[Result]) -> Outcome:
        found = super().outcome(results)
        return replace(found, findings=[*found.findings, *notes(self._roundings(results))])

    def _roundings(self, results: Sequence[Result]) -> list[str]:
        """Of those that ask for it: what rounded."""
        asked = {k for k, one in self.contestants().items() if one.engine.statistics_dtype is not StatisticsDtype.exact}
        runs = Counter((r.coordinates["contestant"], r.found.rounding) for r in results)
        return [f"{k}, {n} runs: {ROUNDED_BY[by]}." for (k, by), n in runs.items() if k in asked]

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
