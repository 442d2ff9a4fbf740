"""The menu: every statistic that `attach` knows by name.

c_b  contributions, sum_b c_b = p.grad        g_b = scale c_b, scale = B for a mean loss, 1 for a sum loss
m    mean of g_b                              q, s2  mean of g_b^2, and its unbiased variance
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.errors import GradstatsError
from gradstats.histogram import Histogram
from gradstats.noise_scale import NoiseEstimate, estimate
from gradstats.projection import Projection
from gradstats.sums import SQUARED_NORMS, SUM_OF_SQUARES, Block, register
from gradstats.window import BlockStatistic, Statistic, Window


class SecondMoment(Statistic):
    """q = (1/B) sum_b g_b^2, elementwise (*shape). Units: gradient squared."""

    name = "second_moment"
    needs = (SUM_OF_SQUARES,)

    def read(self, window: Window) -> Tensor:
        return window.sums["sum_of_squares"] * (window.scale**2 / window.batch_size)


class Variance(Statistic):
    """s2 = B/(B-1) (q - m^2), the unbiased variance of g_b over examples, elementwise (*shape).

    Deviations g_b - m are not at hand in one pass. Where |m| is far above the spread, q - m^2 loses digits and can come
    out below zero, which no variance is: it is floored at 0. The error is small relative to q (float32 epsilon), not to
    s2. With `fraction`, q is of some examples and m of all: s2 is unbiased, and may well be negative.

    Raises: GradstatsError for B = 1, where the variance does not exist.
    """

    name = "variance"
    needs = (SUM_OF_SQUARES,)
    needs_gradient = True

    def read(self, window: Window) -> Tensor:
        b = window.batch_size
        if b < 2:
            raise GradstatsError("the variance over examples needs at least two examples; this batch has one")
        q, m = SecondMoment().read(window), window.mean  # new both, and written over: parameters are large
        s2 = q.sub_(m.square_()).mul_(b / (b - 1))
        return s2.clamp_(min=0) if window.fraction == 1 else s2


class SignalToNoise(Statistic):
    """|m| / sqrt(s2), elementwise (*shape): how far the mean gradient of one example stands out of its spread.

    That of the batch's mean is sqrt(B) times as large. inf where the examples agree to the last digit, 0 where no
    example has a gradient. Raises: GradstatsError for B = 1.
    """

    name = "snr"
    needs = (SUM_OF_SQUARES,)
    needs_gradient = True

    def read(self, window: Window) -> Tensor:
        m, s2 = window.mean.abs(), Variance().read(window)
        return torch.where(m == 0, 0, m / s2.sqrt())


class Norms(Statistic):
    """||g_b||, Euclidean norm of each example's gradient (B,), in the order in which the examples were seen."""

    name = "norms"
    needs = (SQUARED_NORMS,)

    def read(self, window: Window) -> Tensor:
        return window.sums["squared_norms"].sqrt() * window.scale


class SimpleNoiseScale(Statistic):
    """|G|^2, tr Sigma and their ratio, the simple noise scale; unbiased, of one batch (noise_scale.py).

    Raises: GradstatsError for B = 1.
    """

    name = "noise_scale"
    needs = (SQUARED_NORMS,)
    needs_gradient = True

    def read(self, window: Window) -> NoiseEstimate:
        mean_of_squares = window.sums["squared_norms"].sum() * (window.scale**2 / window.batch_size)
        return estimate(window.squared_mean, mean_of_squares, window.batch_size)

    def total(self, windows: Sequence[Window]) -> NoiseEstimate:
        parts = [self.read(window) for window in windows]
        return NoiseEstimate(*(torch.stack(part).sum() for part in zip(*parts, strict=True)))


class SignMean(BlockStatistic):
    """(1/B) sum_b sign(g_b), elementwise (*shape)."""

    name = "sign_mean"
    per = "element"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.sign().sum(0)

    def read(self, window: Window) -> Tensor:
        return window.sums[self.key] / window.batch_size


class AbsMean(BlockStatistic):
    """(1/B) sum_b |g_b|, elementwise (*shape)."""

    name = "abs_mean"
    per = "element"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.abs().sum(0)

    def read(self, window: Window) -> Tensor:
        return window.sums[self.key] * (window.scale / window.batch_size)


class MaxAbs(BlockStatistic):
    """max_b |g_b|, elementwise (*shape)."""

    name = "max_abs"
    per = "element"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c.abs().amax(0)

    @staticmethod
    def merge(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def read(self, window: Window) -> Tensor:
        return window.sums[self.key] * window.scale


class Gram(BlockStatistic):
    """<g_a, g_b> for all pairs of examples (B, B), of one backward pass."""

    name = "gram"
    per = "pair"
    ignores_zeros = True

    def partial(self, block: Block) -> Tensor:
        return block.c @ block.c.T

    def read(self, window: Window) -> Tensor:
        return window.sums[self.key] * window.scale**2


class CosineSimilarity(Statistic):
    """<g_a, g_b> / (||g_a|| ||g_b||) for all pairs of examples (B, B); 0 for an example without a gradient."""

    name = "cosine_similarity"
    needs = (Gram(),)

    def read(self, window: Window) -> Tensor:
        gram = Gram().read(window)
        norms = gram.diagonal().sqrt()
        return torch.where(gram == 0, 0, gram / norms.outer(norms))


STATISTICS: dict[str, type[Statistic]] = {
    statistic.name: statistic
    for statistic in (
        SecondMoment,
        Variance,
        Norms,
        SignMean,
        AbsMean,
        MaxAbs,
        SignalToNoise,
        SimpleNoiseScale,
        Gram,
        CosineSimilarity,
        Histogram,
        Projection,
    )
}


# Known from the start, since forms have formulas for some of them: nothing else may take their names.
for _statistic in STATISTICS.values():
    for _raw in _statistic().needs:
        register(_raw)


Wanted = str | Statistic | type[Statistic]  # a name from the menu, or a statistic of one's own


def statistic_of(wanted: Wanted) -> Statistic:
    """An entry of the menu by name, or a statistic of one's own by class or instance. Raises: GradstatsError."""
    if isinstance(wanted, str):
        if wanted not in STATISTICS:
            raise GradstatsError(
                f"unknown statistic {wanted!r}; the menu is {sorted(STATISTICS)}, and a subclass of "
                f"gradstats.BlockStatistic adds to it"
            )
        return STATISTICS[wanted]()
    found = wanted() if isinstance(wanted, type) else wanted
    if not isinstance(found, Statistic):
        raise GradstatsError(
            f"a statistic is a name or a Statistic, not {wanted!r}: attach(model, 'norms', 'variance')"
        )
    return found


def reference_weight(batch_size: float, reference_batch_size: float) -> float:
    """k for which v_R = (1 - k) m^2 + k q, of a batch of B > 1 examples.

    With s2 = B/(B-1) (q - m^2), the second moment at reference batch size R, v_R = m^2 + (1/R - 1/B) s2, is this
    interpolation at k = (B/R - 1)/(B - 1); E v_R = mu^2 + sigma^2/R. v_1 = q and v_B = m^2. v_R >= 0 for R <= B.
    """
    return (batch_size / reference_batch_size - 1) / (batch_size - 1)
