"""The second moment per token, and per sequence, whose tokens' gradients are summed before they are squared."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contest.analysis import Contest
from experiments.contest.plan import ContestStudy
from experiments.estimate import Finding
from experiments.laboratory.schemas import ContestConfig
from experiments.laboratory.verdicts import equals

SEQUENCE, TOKEN, TOKENS, ADAM = "per sequence", "per token", "per token, R = tokens in a sequence", "squared batch mean"
CLOSE = 0.01  # of a loss in nats a character, in which models that differ much are within a tenth
KEPT = 1.01


class TokenOrSequence(ContestStudy[ContestConfig]):
    title = "Tokens or sequences"
    question = "Is the example of a language model's second moment the token, or the sequence?"
    source = (
        "Open: McAllester, TTIC 31230, squares the gradient of an example, which in a text is a token or a sequence"
    )

    def required(self) -> Sequence[str]:
        return (SEQUENCE, TOKEN, TOKENS, ADAM)

    def findings(self, found: Contest) -> list[Finding]:
        sizes = found.settings.batch_sizes
        home, away = min(sizes), max(sizes)
        return [
            *(_same(found, B) for B in sizes),
            *(_independent(found, B) for B in sizes),
            *(_better(found, label, B) for label in (SEQUENCE, TOKEN) for B in sizes),
            *(_kept(found, label, home, away) for label in found.labels if home < away),
        ]


def _same(found: Contest, B: int) -> Finding:
    ratio = found.ratio(TOKEN, SEQUENCE, B)
    return Finding(
        f"B = {B}: squares of tokens train as squares of sequences do, each tuned, within {CLOSE:.0%}",
        equals(ratio, CLOSE),
        f"Training loss {found.loss(TOKEN, B)} against {found.loss(SEQUENCE, B)} nats a character, a ratio of {ratio}; "
        f"held out {found.held_out(TOKEN, B)} against {found.held_out(SEQUENCE, B)}.",
    )


def _independent(found: Contest, B: int) -> Finding:
    """mu^2 + sigma^2/T of tokens is what a sequence of T independent ones has."""
    ratio = found.ratio(TOKENS, SEQUENCE, B)
    return Finding(
        f"B = {B}: tokens of a sequence may be taken for independent: their second moment at R = tokens in a sequence "
        f"trains as that of sequences does, within {CLOSE:.0%}",
        equals(ratio, CLOSE),
        f"{found.compared(TOKENS, SEQUENCE, B)}.",
    )


def _better(found: Contest, label: str, B: int) -> Finding:
    ratio = found.ratio(label, ADAM, B)
    return Finding(
        f"B = {B}: second moments {label} train at least as well as ordinary Adam's squared batch mean",
        ratio.verdict(1 + CLOSE),
        f"{found.compared(label, ADAM, B)}.",
    )


def _kept(found: Contest, label: str, home: int, away: int) -> Finding:
    price = found.kept(label, away, home)
    return Finding(
        f"{label.capitalize()}: the learning rate tuned at B = {home} is good at B = {away}: at most {KEPT:g} times "
        "the loss of the one tuned there",
        found.is_kept(label, away, home, KEPT),
        f"It makes the training loss {price} times as high.",
    )


STUDY = TokenOrSequence
