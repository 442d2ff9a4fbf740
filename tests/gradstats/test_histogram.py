"""Sizes of elements at the ends of what numbers can be."""

import pytest
import torch

from gradstats.histogram import Histogram
from gradstats.sums import Block
from gradstats.window import Window


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_size_is_counted(dtype):
    """Subnormal, huge, infinite and undefined values, and what only float64 has."""
    histogram = Histogram()
    c = torch.tensor([[0.0, 1.0, -1.0, 1.5, 2.0, 2**-149, 3e38, torch.inf, torch.nan, 1e-300, -1e300]], dtype=dtype)
    sums = {"histogram": histogram.partial(Block(c, torch.arange(11), ""))}
    counts, edges, zeros = histogram.read(Window(sums, None, 1, "sum", elements=11))
    assert zeros == (1 if dtype == torch.float64 else 2) and counts.sum() == 11 - zeros
    at = {float(edges[i]): int(n) for i, n in enumerate(counts) if n}
    assert at == {0.0: 2 if dtype == torch.float64 else 1, 1.0: 3, 2.0: 1, 2.0**127: 1, 2.0**128: 3}
