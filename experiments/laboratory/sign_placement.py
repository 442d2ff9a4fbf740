"""The sign of a gradient before the mean over a batch, after it, and after the running average."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding
from experiments.laboratory.schemas import ContestConfig

BEFORE, AFTER, AVERAGE = "before the mean", "after the mean", "after the running average"


class SignPlacement(ContestStudy[ContestConfig]):
    title = "Where to take the sign"
    question = "Does the sign belong before the mean over examples, after it, or after the running average?"
    source = "Bernstein et al. 2018, signSGD and Signum; McAllester, TTIC 31230"

    def required(self) -> Sequence[str]:
        return (BEFORE, AFTER, AVERAGE)

    def findings(self, found: Contest) -> list[Finding]:
        sizes = found.settings.batch_sizes
        pairs = ((BEFORE, AFTER), (AVERAGE, AFTER), (AVERAGE, BEFORE))
        return [_better(found, *pair, B) for pair in pairs for B in sizes]


def _better(found: Contest, first: str, second: str, B: int) -> Finding:
    ratio = found.ratio(first, second, B)
    return Finding(
        f"B = {B}: the sign {first} trains better than {second}",
        ratio.verdict(1),
        f"Training loss {found.loss(first, B)} against {found.loss(second, B)}, a ratio of {ratio}.",
    )


STUDY = SignPlacement
