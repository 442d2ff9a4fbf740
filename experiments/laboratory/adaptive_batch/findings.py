"""Whether a growing batch does what a decaying learning rate does, at what price, and whether it follows the noise."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Array, Estimate, Finding, at_edge, notes
from experiments.laboratory.adaptive_batch.analysis import GROWING, PRICES, Analysis
from experiments.laboratory.adaptive_batch.contenders import KEPT, STEP, fixed
from experiments.laboratory.verdicts import equals, within
from experiments.schemas.run import Decay

CLOSE = 0.1  # of a loss
AS_GOOD = 1.05  # of a loss, above which a method is worse
FEWER = 0.5  # of the steps
NEAR = 4.0  # from the noise scale: AdaptiveBatchSize tends to between 1/4 and 1 of it

SAID = {
    KEPT: "a batch that grows at constant lr0",
    STEP: "a batch that grows at a constant step (Smith et al.)",
}


def findings(found: Analysis) -> list[Finding]:
    return [
        _invariant(found),
        *(_as_good(found, label, held_out) for label in GROWING for held_out in (False, True)),
        *(_fewer(found, label) for label in GROWING),
        *(_sooner(found, price, label, B) for price in PRICES for label in GROWING for B in found.settings.batch_sizes),
        *(_follows(found, label) for label in GROWING),
        *notes([_worth(found), *_edges(found)]),
    ]


def _invariant(found: Analysis) -> Finding:
    other = fixed(Decay.none, found.slow)
    ratio = found.ratio(KEPT, other)
    return Finding(
        f"At equal examples {SAID[KEPT]} trains as the constant B = {found.slow} does, within {CLOSE:.0%}: only steps "
        "are saved",
        equals(ratio, CLOSE),
        f"The training loss is {ratio} times that of the fixed batch, in {found.steps(KEPT, other)} times the steps.",
    )


def _as_good(found: Analysis, label: str, held_out: bool) -> Finding:
    rival = found.rival(found.slow)
    ratio = found.ratio(label, rival, held_out)
    return Finding(
        f"At equal examples {SAID[label]} reaches the {'held-out' if held_out else 'training'} loss of a tuned decay "
        f"at B = {found.slow}: at most {AS_GOOD:g} times that",
        ratio.verdict(AS_GOOD),
        f"It is {ratio} times that of {rival}, the better decay, over {found.counts[-1]:,} examples.",
    )


def _fewer(found: Analysis, label: str) -> Finding:
    rival = found.rival(found.slow)
    ratio = found.steps(label, rival)
    return Finding(
        f"{_capital(SAID[label])} takes at most {FEWER:g} times the steps of B = {found.slow}",
        ratio.verdict(FEWER),
        f"Over the same examples it takes {ratio} times the steps of {rival}, and {found.seconds(label, rival)} times "
        "the seconds, in runs that took turns.",
    )


def _sooner(found: Analysis, price: str, label: str, B: int) -> Finding:
    rival = found.rival_at_equal(price, label, B)
    limited = found.limited[price, label, rival]
    held_out = found.ratio_at_equal(price, label, rival, held_out=True)
    ratio = found.ratio_at_equal(price, label, rival)
    return Finding(
        f"At equal {price} {SAID[label]} reaches a lower training loss than a tuned decay at B = {B}",
        ratio.verdict(1),
        f"Its loss is {ratio} times that of {rival}, tuned over the {limited.examples:,} examples that take as many "
        f"{price} as its {found.counts[-1]:,}; held out {held_out} times. Over equal examples it takes "
        f"{found.share(price, label, rival)} times the {price}: both intervals have that uncertainty.",
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _follows(found: Analysis, label: str) -> Finding:
    ratio = found.to_noise(label)
    return Finding(
        f"{_capital(SAID[label])} follows the noise scale within a factor of {NEAR:g}, up to "
        f"B = {found.settings.largest}",
        within(ratio, 1 / NEAR, NEAR),
        f"In the second half of the looks B is {ratio} times the noise scale over the training set, or the largest B "
        f"where that is smaller. After {', '.join(f'{count:,}' for count in found.counts)} examples B is "
        f"{_mean(found.races[label].size)}, and the noise scale {_mean(found.races[label].noise)}.",
    )


def _mean(values: Array) -> str:
    """Geometric means over seeds (S, T); of those that are known."""
    means = [np.exp(np.log(row[np.isfinite(row)]).mean()) if np.isfinite(row).any() else np.nan for row in values.T]
    return ", ".join(Estimate(mean, mean, mean).text() for mean in means)


def _worth(found: Analysis) -> str:
    told = "; ".join(
        f"{found.rival(B)} {found.ratio(found.rival(B), fixed(Decay.none, B))}" for B in found.settings.batch_sizes
    )
    return f"What decays at all, over the constant learning rate at the same batch size, in training loss: {told}."


def _edges(found: Analysis) -> list[str]:
    cases = [label for label, tuned in found.tuned.items() if tuned.at_edge]
    cases += [f"{rival} over {tuned.examples:,}" for (*_, rival), tuned in found.limited.items() if tuned.at_edge]
    return at_edge("lr", list(dict.fromkeys(cases)))
