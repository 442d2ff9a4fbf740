"""What every statistic means, written out on all per-example gradients g (B, *shape) of a parameter: for the oracle.

Independent of how the statistics are computed: variances from deviations, |G|^2 as the mean of <g_a, g_b> over pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradstats.forms.dense import Dense
from gradstats.noise_scale import NoiseEstimate
from gradstats.window import Statistic, Window


def flat(g: Tensor) -> Tensor:
    return g.reshape(len(g), -1)


def noise(g: Tensor) -> NoiseEstimate:
    b, f = len(g), flat(g)
    pairs = (f @ f.T).sum() - f.square().sum()
    return NoiseEstimate(pairs / (b * (b - 1)), (f - f.mean(0)).square().sum() / (b - 1))


DEFINITIONS: dict[str, Callable[[Tensor], Any]] = {
    "second_moment": lambda g: g.square().mean(0),
    "variance": lambda g: (g - g.mean(0)).square().sum(0) / max(len(g) - 1, 1),
    "norms": lambda g: flat(g).norm(dim=1),
    "sign_mean": lambda g: g.sign().mean(0),
    "abs_mean": lambda g: g.abs().mean(0),
    "max_abs": lambda g: g.abs().amax(0),
    "snr": lambda g: g.mean(0).abs() / g.std(0),
    "noise_scale": noise,
    "gram": lambda g: flat(g) @ flat(g).T,
    "cosine_similarity": lambda g: F.normalize(flat(g), eps=1e-300) @ F.normalize(flat(g), eps=1e-300).T,
}


def comparable(name: str, value: Any, g: Tensor, zero: float) -> list[Tensor]:
    """What can be compared of a statistic of g, if gradients of the size of `zero` are nothing but rounding.

    Statistics without the unit of a gradient magnify rounding. A deviation below a tenth of the mean is one too, since
    it comes from a difference of squares.
    """
    if name == "norms":  # in the unit of their sums, to which the floor of the error is relative
        return [value.square()]
    if name == "sign_mean":
        return [value[(g.abs() > zero).all(0)]]
    if name == "snr":
        m, s = g.mean(0).abs(), g.std(0)
        return [value[(m > zero) & (s > 0.1 * m)]]
    if name == "cosine_similarity":
        stands_out = flat(g).norm(dim=1) > zero
        return [value[stands_out.outer(stands_out)]]
    if name == "histogram":
        return [value.counts[value.edges[:-1] > zero]]
    return tree_leaves(value)


def define(statistic: Statistic, parameter: str, g: Tensor, loss_reduction: str) -> Any:
    """The statistic of g by its definition; one that is not of the menu, by its own sums over g."""
    if statistic.name in DEFINITIONS:
        return DEFINITIONS[statistic.name](g)
    contribution = Dense(g / len(g) if loss_reduction == "mean" else g)
    contribution.parameter = parameter
    gradient, sums = contribution.from_blocks([raw.key for raw in statistic.needs])
    return statistic.read(Window(sums, gradient, len(g), loss_reduction, elements=g[0].numel()))
