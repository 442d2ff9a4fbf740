"""How large the elements of per-example gradients are: counts in powers of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstats.sums import Block
from gradstats.window import BlockStatistic, Window

# Bin i holds the numbers whose exponent float32 stores as i, 2^(i-127) <= |c| < 2^(i-126); the lowest all that are
# smaller, the highest all that are larger, infinite or undefined.
BINS, BIAS = 256, 127


class Counts(NamedTuple):
    """Elements of g_b over all examples: counts[i] with edges[i] <= |g| < edges[i + 1], and those that are zero."""

    counts: Tensor  # (bins,), whole numbers in float64
    edges: Tensor  # (bins + 1,)
    zeros: Tensor  # ()


class Histogram(BlockStatistic):
    """Counts of |g| over the elements of all per-example gradients of a parameter.

    Bins are powers of two of the contributions, so the edges carry the scale.
    """

    name = "histogram"
    per = "batch"
    trailing = (BINS,)
    ignores_zeros = True  # what is not counted is zero

    def dtype(self, parameter: torch.dtype) -> torch.dtype:
        return torch.float64  # counts exceed the 2^24 up to which float32 is exact

    def partial(self, block: Block) -> Tensor:
        counts = torch.bincount(stored_exponent(block.c).flatten(), minlength=BINS)
        counts[0] -= block.c.numel() - torch.count_nonzero(block.c)
        return counts.double()

    def read(self, window: Window) -> Counts:
        counts = window.sums[self.key]
        exponents = torch.arange(1 - BIAS, BINS - BIAS, dtype=torch.float64, device=counts.device)
        edges = F.pad(torch.exp2(exponents), (1, 1))
        edges[-1] = torch.inf
        zeros = window.batch_size * window.elements - counts.sum()
        return Counts(counts, edges * window.scale, zeros)


def stored_exponent(c: Tensor) -> Tensor:
    """The bin of every c, read off the bits of the number."""
    if c.dtype == torch.float32:
        return (c.view(torch.int32) >> 23) & 0xFF
    return (((c.view(torch.int64) >> 52) & 0x7FF) - (1023 - BIAS)).clamp_(0, BINS - 1)
