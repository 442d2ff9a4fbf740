"""Kinds of running average over the same horizon, and eps, where batches are large."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.verdicts import equals

DEBIASED, EWMA, SLIDES, MEAN = "debiased EWMA", "EWMA", "min(t, N) mean", "simple mean"
PER_EXAMPLE, PER_BATCH = "eps on examples", "eps on batches"
CLOSE = 0.05  # of a loss
KEPT = 1.1  # of a loss, for a learning rate tuned at another batch size


class Horizons(ContestStudy[ContestConfig]):
    title = "Averages and eps at large batches"
    question = "Which running average trains best at large batches, and on which scale must eps be?"
    source = "McAllester, TTIC 31230, SGD, Momentum, RMSProp, Adam: averages with weight 1/min(t, N); eps"

    def required(self) -> Sequence[str]:
        return (DEBIASED, EWMA, SLIDES, MEAN, PER_EXAMPLE, PER_BATCH)

    def findings(self, found: Contest) -> list[Finding]:
        sizes = found.settings.batch_sizes
        return [
            *(_slides(found, B) for B in sizes),
            *(_debiased(found, B) for B in sizes),
            *(_forgets(found, B) for B in sizes),
            _eps(found, PER_EXAMPLE),
            _eps(found, PER_BATCH),
        ]


def _slides(found: Contest, B: int) -> Finding:
    ratio = found.ratio(SLIDES, DEBIASED, B)
    return Finding(
        f"B = {B}: the slides' min(t, N) mean trains as the debiased EWMA of horizon N does, within {CLOSE:.0%}",
        equals(ratio, CLOSE),
        f"{found.compared(SLIDES, DEBIASED, B)}.",
    )


def _debiased(found: Contest, B: int) -> Finding:
    ratio = found.ratio(DEBIASED, EWMA, B)
    return Finding(
        f"B = {B}: a debiased EWMA trains better than one that starts from zero",
        ratio.verdict(1),
        f"{found.compared(DEBIASED, EWMA, B)}.",
    )


def _forgets(found: Contest, B: int) -> Finding:
    ratio = found.ratio(DEBIASED, MEAN, B)
    return Finding(
        f"B = {B}: an average that forgets trains better than the mean of all gradients so far",
        ratio.verdict(1),
        f"{found.compared(DEBIASED, MEAN, B)}.",
    )


def _eps(found: Contest, label: str) -> Finding:
    """eps that counts: with squares of batches, whose root falls as 1/sqrt(B), the same eps is another optimizer."""
    home, away = min(found.settings.batch_sizes), max(found.settings.batch_sizes)
    price = found.kept(label, away, home)
    of = "single examples" if label == PER_EXAMPLE else "batches"
    return Finding(
        f"With eps of the size of the gradients and beside the root mean square of {of}, the learning rate tuned at "
        f"B = {home} is good at B = {away}: at most {KEPT:g} times the loss of the one tuned there",
        found.is_kept(label, away, home, KEPT),
        f"It makes the training loss {price} times as high. Tuned for itself, that is {found.loss(label, away)} at "
        f"B = {away} and {found.loss(label, home)} at B = {home}.",
    )


STUDY = Horizons
