"""Time in examples. Running averages whose memory is a number of examples, whatever the batch size.

E counts the examples seen by an average, this batch of B included. An average moves by a weight w(B, E):

    x~ <- (1 - w) x~ + w x

"mean":          w = B / E, the plain mean of all examples.
"ewma":          w = 1 - rho^B, the exponential average that starts from zero, as in torch's RMSprop.
"debiased_ewma": w = (1 - rho^B) / (1 - rho^E), the same without the zero. Splitting a batch in any way gives the same
                 weights to its parts' mean, and at constant B it is torch Adam's average with beta = rho^B.
"slides":        w = B / min(E, N), McAllester's form: the plain mean of the first N examples, then an average of
                 horizon N. The slides print N_s = min(1, N/B), which would never exceed 1: read max, so that w <= 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from gradstats.errors import GradstatsError


def forgotten(rho: float, examples: float) -> float:
    """1 - rho^examples, evaluated without cancellation for rho near 1."""
    return 1.0 if rho == 0 else -math.expm1(examples * math.log(rho))


def decay_of(horizon: float) -> float:
    """rho = 1 - 1/N per example, of an average that remembers N examples. Raises: GradstatsError for N below 1."""
    if isinstance(horizon, str) or not horizon >= 1:
        raise GradstatsError(f"horizons are numbers of examples, at least 1; got {horizon!r}")
    return 1 - 1 / horizon


class Average(ABC):
    """A running average in examples."""

    @abstractmethod
    def weight(self, b: int, e: int) -> float:
        """w(B, E)."""

    def mass(self, e: int) -> float:
        """The share of the data in the average after E examples; the rest is that of the zero it started from."""
        return 1.0

    def bias_correction(self, e: int) -> float:
        """What torch's Adam divides a running average from zero by, after E examples; 1 where it would not."""
        return 1.0


@dataclass(frozen=True)
class Mean(Average):
    """The plain mean of all examples."""

    def weight(self, b: int, e: int) -> float:
        return b / e


@dataclass(frozen=True)
class EWMA(Average):
    """Exponential average from zero, with decay `rho` per example, 0 <= rho < 1."""

    rho: float

    def weight(self, b: int, e: int) -> float:
        return forgotten(self.rho, b)

    def mass(self, e: int) -> float:
        return forgotten(self.rho, e)


@dataclass(frozen=True)
class DebiasedEWMA(Average):
    """Exponential average without a start, with decay `rho` per example, 0 <= rho < 1."""

    rho: float

    def weight(self, b: int, e: int) -> float:
        return forgotten(self.rho, b) / forgotten(self.rho, e)

    def bias_correction(self, e: int) -> float:
        return forgotten(self.rho, e)


@dataclass(frozen=True)
class Slides(Average):
    """Average of horizon N examples: w(B, E) = B / min(E, max(N, B))."""

    horizon: float

    def weight(self, b: int, e: int) -> float:
        return b / min(e, max(self.horizon, b))


AVERAGES = ("mean", "ewma", "debiased_ewma", "slides")


def average(kind: str, beta: float, batch_size: float) -> Average:
    """The average in examples whose weight at batch size `batch_size` is torch's 1 - beta.

    Exponential: rho = beta^(1/batch_size). "slides": N = batch_size / (1 - beta), the same limit weight there. The
    plain mean has no beta. Raises: GradstatsError.
    """
    if kind == "mean":
        return Mean()
    if kind == "ewma":
        return EWMA(beta ** (1 / batch_size))
    if kind == "debiased_ewma":
        return DebiasedEWMA(beta ** (1 / batch_size))
    if kind == "slides":
        return Slides(batch_size / (1 - beta))
    raise GradstatsError(f"average must be one of {AVERAGES}, not {kind!r}")
