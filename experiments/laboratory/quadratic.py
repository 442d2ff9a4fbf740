"""Gradient descent on h beta^2 / 2 with noisy gradients: what it does, in closed form.

The error e is the distance from the minimum. A step of learning rate eta, with a gradient whose noise has variance s2,

    e_t+1 = (1 - eta h) e_t + eta noise        mean   m_t+1 = (1 - eta h) m_t
                                               variance v_t+1 = (1 - eta h)^2 v_t + eta^2 s2
"""

from __future__ import annotations

import math

import numpy as np

from experiments.estimate import Array


def moments(rates: Array, noise: float, start: float, curvature: float = 1.0) -> tuple[Array, Array]:
    """Mean and variance of the error after each of the steps at these learning rates (T,); noise: variance s2."""
    mean, variance = np.empty(len(rates)), np.empty(len(rates))
    m, v = start, 0.0
    for t, eta in enumerate(rates):
        m, v = (1 - eta * curvature) * m, (1 - eta * curvature) ** 2 * v + eta**2 * noise
        mean[t], variance[t] = m, v
    return mean, variance


def stationary_variance(rate: float, noise: float, curvature: float = 1.0, momentum: float = 0.0) -> float:
    """Where v_t+1 = v_t, also of torch's heavy ball: eta s2 (1 + m) / (h (1 - m) (2 (1 + m) - eta h)).

    For 0 < eta h < 2 (1 + m).
    """
    turns = 1 + momentum
    return rate * noise * turns / (curvature * (1 - momentum) * (2 * turns - rate * curvature))


def power_rates(scale: float, power: float, steps: int) -> Array:
    """eta_t = scale / t^power for t = 1, 2, ..., (T,)."""
    rates: Array = scale / np.arange(1, steps + 1, dtype=np.float64) ** power
    return rates


def left_for_ever(scale: float) -> float:
    """The share of the distance that eta_t = scale / t^2 never covers at h = 1: the product of 1 - scale / t^2.

    Source: Euler's product of the sine, sin(pi z) / (pi z) with z^2 = scale.
    """
    z = math.pi * math.sqrt(scale)
    return math.sin(z) / z
