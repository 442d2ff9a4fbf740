"""What may end invariance to the batch size, each with the batch size at which it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from experiments.laboratory.drift.analysis import crossing
from experiments.schemas.optimizer import BatchInvariantAdamConfig

HORIZON, EDGE, NOISE, DRIFT = "horizon of momentum", "edge of stability", "noise scale", "drift"
NOISE_IN_UNITS, DRIFT_IN_UNITS = "noise scale, Adam's units", "drift, Adam's units"
PREDICTORS = (HORIZON, EDGE, NOISE, NOISE_IN_UNITS, DRIFT, DRIFT_IN_UNITS)

FARTHEST = 1e9  # a batch size that nothing reaches


@dataclass(frozen=True)
class Tuned:
    """A step on B examples is B lr/B0 long, and keeps beta^(B/B0) of the average."""

    lr: float
    beta: float
    batch_size: float  # B0

    @staticmethod
    def of(optimizer: BatchInvariantAdamConfig) -> Tuned:
        return Tuned(optimizer.lr, optimizer.betas[0], optimizer.batch_size)

    @property
    def horizon(self) -> float:
        """N, in examples: 1 - beta^(1/B0) = 1/N."""
        return 1 / (1 - self.beta ** (1 / self.batch_size))

    def stability(self, B: float) -> float:
        """The largest eigenvalue of P^-1 H at which steps m <- beta m + (1 - beta) g, p <- p - step m/P do not diverge:
        (2 + 2 beta)/((1 - beta) step) (Cohen et al., arXiv:2207.14484)."""
        beta = self.beta ** (B / self.batch_size)
        return (2 + 2 * beta) / ((1 - beta) * B * self.lr / self.batch_size)

    def edge(self, sharpness: float) -> float:
        """The batch size at which a sharpness is that; below it the steps are stable."""
        if not sharpness > 0:
            return FARTHEST

        def gap(log_size: float) -> float:
            return math.log(self.stability(math.exp(log_size)) / sharpness)

        low, high = math.log(1 / FARTHEST), math.log(FARTHEST)
        return math.exp(brentq(gap, low, high)) if gap(low) > 0 > gap(high) else FARTHEST


def predictions(tuned: Tuned, look: dict[str, Any]) -> dict[str, float]:
    """From what was measured at one point of a run (look.py), the batch size of each predictor.

        noise scale    tr Sigma / ||g||^2                        (McCandlish et al., arXiv:1812.06162)
        drift          ||g(E+B) - g(E)||^2 = tr Sigma / B        the gradient moves by the noise of the batch

    In Adam's units squares are weighted by 1/P.
    """
    lengths = np.array(look["lengths"])
    found = {HORIZON: tuned.horizon, EDGE: tuned.edge(look["sharpness"])}
    for noise, drift, of in ((NOISE, DRIFT, look["plain"]), (NOISE_IN_UNITS, DRIFT_IN_UNITS, look["scaled"])):
        found[noise] = of["trace"] / of["signal"]
        found[drift] = crossing(look["lengths"], np.array(of["drift"]), of["trace"] / lengths)
    return found
