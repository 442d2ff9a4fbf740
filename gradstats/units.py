"""Time in examples. Running averages whose memory is a number of examples, whatever the batch size.

E counts the examples seen by an average, this batch of B included. An average moves by a weight w(B, E):

    x~ <- (1 - w) x~ + w x

Exponential:  w = (1 - rho^B) / (1 - rho^E), the debiased exponential average with decay rho per example. Splitting a
              batch in any way gives the same weights to its parts' mean, and at constant B it is torch Adam's average
              with beta = rho^B.
Slides:       w = B / min(E, N), McAllester's form: the plain mean of the first N examples, then an average of horizon
              N. The slides print N_s = min(1, N/B), which would never exceed 1: read max, so that w <= 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradstats.errors import GradstatsError


@dataclass(frozen=True)
class Exponential:
    """Debiased exponential average with decay `rho` per example, 0 <= rho < 1."""

    rho: float

    def weight(self, b: int, e: int) -> float:
        """w(B, E) = (1 - rho^B)/(1 - rho^E), evaluated without cancellation for rho near 1."""
        if self.rho == 0:
            return 1.0
        log_rho = math.log(self.rho)
        return math.expm1(b * log_rho) / math.expm1(e * log_rho)


@dataclass(frozen=True)
class Slides:
    """Average of horizon N examples: w(B, E) = B / min(E, max(N, B))."""

    horizon: float

    def weight(self, b: int, e: int) -> float:
        """w(B, E)."""
        return b / min(e, max(self.horizon, b))


Average = Exponential | Slides
AVERAGES = ("exponential", "slides")


def average(kind: str, beta: float, batch_size: float) -> Average:
    """The average in examples whose weight at batch size `batch_size` is torch's 1 - beta.

    "exponential": rho = beta^(1/batch_size). "slides": N = batch_size / (1 - beta), the same limit weight there.
    """
    if kind == "exponential":
        return Exponential(beta ** (1 / batch_size))
    if kind == "slides":
        return Slides(batch_size / (1 - beta))
    raise GradstatsError(f"average must be one of {AVERAGES}, not {kind!r}")
