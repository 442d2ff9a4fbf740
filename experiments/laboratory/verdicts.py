"""Verdicts on claims that a number equals another one, and on two claims at once."""

from __future__ import annotations

import numpy as np

from experiments.estimate import Estimate, Verdict


def within(estimate: Estimate, low: float, high: float) -> Verdict:
    """Whether the number lies from low to high: judged only where its whole interval is inside, or outside."""
    if not np.isfinite([estimate.value, estimate.low, estimate.high]).all():
        return "cannot be judged"
    if estimate.low > high or estimate.high < low:
        return "does not hold"
    return "holds" if estimate.low >= low and estimate.high <= high else "cannot be judged"


def equals(ratio: Estimate, tolerance: float) -> Verdict:
    """Whether a ratio is 1, within the tolerance."""
    return within(ratio, 1 - tolerance, 1 + tolerance)


def both(first: Verdict, second: Verdict) -> Verdict:
    if "does not hold" in (first, second):
        return "does not hold"
    return "holds" if first == second == "holds" else "cannot be judged"
