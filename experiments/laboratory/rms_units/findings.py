"""Which step stays the same in which units, and which trains better."""

from __future__ import annotations

from experiments.estimate import Finding, Verdict, at_edge, notes, over_seeds
from experiments.laboratory.rms_units.analysis import EXPONENTS, LABELS, UNIT_LABELS, UNITS, Analysis, log_price

# Rounding in float64, amplified along the training, stays far below; another step moves predictions by their own size.
EXACT = 1e-6


def findings(analysis: Analysis) -> list[Finding]:
    return [
        _invariant(analysis, 1.0, "weights", "loss"),
        _invariant(analysis, 0.5, "loss", "weights"),
        _better(analysis),
        *(_kept(analysis, exponent, units) for exponent, units in ((1.0, "weights"), (0.5, "loss"))),
        *_notes(analysis),
    ]


def _invariant(analysis: Analysis, exponent: float, kept: str, changed: str) -> Finding:
    """The claim is of both: that the one is kept, and the other is not."""
    by_kept, by_changed = (analysis.largest(exponent, units, True) for units in (kept, changed))
    verdict: Verdict = "holds" if by_kept <= EXACT < by_changed else "does not hold"
    return Finding(
        f"Training by {LABELS[exponent]} does not depend on the unit of the {kept}, and does on that of the {changed}: "
        f"predictions change by at most {EXACT:.0e} of themselves, and by more",
        verdict,
        f"Over {analysis.steps[-1]} steps predictions differ by at most {by_kept:.1e} of themselves in "
        f"{UNIT_LABELS[kept]}, and by up to {by_changed:.1e} in {UNIT_LABELS[changed]}. With eps held fixed, where it "
        f"has a unit too, they differ by up to {analysis.largest(exponent, kept, False):.1e} in {UNIT_LABELS[kept]}.",
    )


def _better(analysis: Analysis) -> Finding:
    ratio = analysis.ratio("original")
    return Finding(
        "g/sigma^2 trains better than g/sigma, both tuned",
        ratio.verdict(1),
        f"Its final loss is {ratio} times that of g/sigma: {analysis.loss(1.0, 'original', 'original')} against "
        f"{analysis.loss(0.5, 'original', 'original')}. Tuned again in other units of the weights, it is "
        f"{analysis.ratio('weights')} times.",
    )


def _kept(analysis: Analysis, exponent: float, units: str) -> Finding:
    price = analysis.price(exponent, units)
    other = next(x for x in EXPONENTS if x != exponent)
    lower = over_seeds(analysis.log_loss, lambda rows: log_price(rows, exponent, units) - log_price(rows, other, units))
    return Finding(
        f"In {UNIT_LABELS[units]}, with the values kept, {LABELS[exponent]} loses less than {LABELS[other]}",
        lower.verdict(0),
        f"The final loss of {LABELS[exponent]} becomes {price} times as high, that of {LABELS[other]} "
        f"{analysis.price(other, units)} times; eps is held fixed, as an optimizer's is.",
    )


def _notes(analysis: Analysis) -> list[Finding]:
    cases = {(x, units): f"{LABELS[x]} in {UNIT_LABELS[units]}" for x in EXPONENTS for units in UNITS}
    lrs = [told for case, told in cases.items() if analysis.chosen(*case)[0] in (0, analysis.lrs.shape[1] - 1)]
    floors = [told for case, told in cases.items() if analysis.chosen(*case)[1] in (0, len(analysis.floors) - 1)]
    return notes([*at_edge("lr", lrs), *at_edge("floor", floors)])
