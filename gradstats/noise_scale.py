"""The gradient noise scale (McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162, 2.2, A.1).

    |G|^2    squared norm of the true gradient        tr Sigma    trace of the covariance of per-example gradients
    B_simple = tr Sigma / |G|^2                       the batch size at which noise and signal are equal

From one batch, with M = ||m||^2 and Q = (1/B) sum_b ||g_b||^2, unbiased:

    tr Sigma = B/(B-1) (Q - M)        |G|^2 = M - tr Sigma / B

The ratio of the two is not unbiased and one batch says little about it: average both, then divide.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.units import DebiasedEWMA

if TYPE_CHECKING:
    from gradstats.handle import Handle


class NoiseEstimate(NamedTuple):
    """Unbiased estimates from one batch, of one parameter or of the whole gradient."""

    gradient_squared: Tensor  # |G|^2 (); an unbiased estimate can be negative
    trace: Tensor  # tr Sigma ()

    @property
    def simple(self) -> Tensor:
        """B_simple = tr Sigma / |G|^2, in examples, or in what else the statistics are over."""
        return self.trace / self.gradient_squared

    def __repr__(self) -> str:
        values = f"gradient_squared={float(self.gradient_squared):.4g}, trace={float(self.trace):.4g}"
        return f"NoiseEstimate(simple={float(self.simple):.4g}, {values})"


def estimate(mean_squared: Tensor, mean_of_squares: Tensor, b: int) -> NoiseEstimate:
    """From M = ||m||^2 and Q = (1/B) sum_b ||g_b||^2 of a batch of b examples. Raises: GradstatsError for b = 1."""
    if b < 2:
        raise GradstatsError("the noise scale needs at least two examples; this batch has one")
    trace = (mean_of_squares - mean_squared) * (b / (b - 1))
    return NoiseEstimate(mean_squared - trace / b, trace)


class NoiseScale:
    """Running averages of |G|^2 and tr Sigma over batches, their ratio, and how well it is known.

        noise = NoiseScale(horizon=10_000)
        noise.update(stats)        # after every backward pass
        noise.simple, noise.interval(0.95)

    Both are averaged separately, with a memory of `horizon` examples (units.py) at rho = 1 - 1/horizon.
    """

    def __init__(self, horizon: float):
        if not horizon > 1:
            raise GradstatsError(f"horizon must be more than one example, not {horizon}")
        self.horizon = horizon
        self.examples = 0
        self.gradient_squared = 0.0
        self.trace = 0.0
        # Weighted (co)variance of the estimates around their averages, and the sum of squared weights.
        self._variance_g = self._variance_t = self._covariance = 0.0
        self._squared_weights = 0.0
        self._waiting = 0  # examples since the noise scale was last gathered (attach(..., every=k))

    def update(self, stats: Handle) -> None:
        """Adds the estimates of the whole gradient from the last window, for which it waits for the device.

        Examples of windows that were not gathered (attach(..., every=k)) count with the next one that is. A batch of
        one example, and gradients that overflowed under a GradScaler, say nothing and are passed over.

        Raises: MissingStatistic if "noise_scale" was not collected.
        """
        if stats.batch_size < 2:
            return
        if not stats.gathered:
            self._waiting += stats.batch_size
            return
        estimate = stats.noise_scale.total
        if math.isfinite(float(estimate.trace)):
            self.add(estimate, stats.batch_size + self._waiting)
            self._waiting = 0

    def add(self, estimate: NoiseEstimate, batch_size: int) -> None:
        """Adds estimates, of one parameter or of the whole gradient, that stand for so many examples."""
        self.examples += batch_size
        w = DebiasedEWMA(1 - 1 / self.horizon).weight(batch_size, self.examples)
        g = float(estimate.gradient_squared) - self.gradient_squared
        t = float(estimate.trace) - self.trace
        self.gradient_squared += w * g
        self.trace += w * t
        self._variance_g = (1 - w) * (self._variance_g + w * g * g)
        self._variance_t = (1 - w) * (self._variance_t + w * t * t)
        self._covariance = (1 - w) * (self._covariance + w * g * t)
        self._squared_weights = (1 - w) ** 2 * self._squared_weights + w * w

    @property
    def simple(self) -> float:
        """B_simple, in examples; inf where no gradient stands out of the noise."""
        return self.trace / self.gradient_squared if self.gradient_squared > 0 else math.inf

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bounds on B_simple by Fieller's theorem, from the scatter of the estimates between batches.

        It holds for independent batches at parameters that hardly move within the horizon. The upper bound is inf
        where |G|^2 cannot be told from zero; after fewer than two batches it is (0, inf).
        """
        s = self._squared_weights
        if s == 0 or s > 1 - 1e-9:
            return 0.0, math.inf
        of_mean = s / (1 - s)  # from the weighted variance of estimates to the variance of their average
        z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * of_mean
        # r is inside if (T - r G)^2 <= z^2 var(T - r G):  a r^2 - 2 b r + c <= 0
        a = self.gradient_squared**2 - z2 * self._variance_g
        b = self.gradient_squared * self.trace - z2 * self._covariance
        c = self.trace**2 - z2 * self._variance_t
        root = math.sqrt(max(b * b - a * c, 0.0))
        if a > 0 and self.gradient_squared > 0:
            return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
        return (max((b - root) / a, 0.0) if a < 0 < c and b * b > a * c else 0.0), math.inf

    def __repr__(self) -> str:
        low, high = self.interval()
        known = f"simple={self.simple:.4g}, 95% in [{low:.4g}, {high:.4g}], " if self.examples else ""
        return f"NoiseScale({known}examples={self.examples}, horizon={self.horizon:g})"

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: GradstatsError for a state with other entries."""
        if state.keys() != vars(self).keys():
            raise GradstatsError(f"a NoiseScale has the state {sorted(vars(self))}, not {sorted(state)}")
        vars(self).update(state)
