"""Orthogonal contrasts of a batch: signs of its examples whose squared sums tell how gradients scatter.

Let n be the smallest power of two >= B, H the Hadamard matrix of order n without its row of ones, its columns in random
order, and w_j the first B entries of row j, less their mean. With contributions c_b, d_b = c_b - (1/B) sum_b c_b and
T_j = sum_b w_jb c_b, elementwise,

    D^ = (n-1)/(n k) sum_{j<=k} T_j^2        E D^ = D = sum_b d_b^2        D^ >= 0

    Var D^ = 2 ((n^2 - 3n + 3) D^2 - n (n-1) sum_b d_b^4) / (n (n-3)) * (n-1-k) / (k (n-2))        for n > 2

Since sum_b d_b = 0, T_j = sum_b H_jb d_b with d = 0 where there is no example: the mean gradient drops out, whatever
B. The rows of H with the row of ones are orthogonal, so that all n - 1 of them have sum_j T_j^2 = n D, in any order.
In random order each T_j is alike, hence E T_j^2 = n D/(n-1), and its fourth moment is that of balanced signs (+1 and -1
equally often, at random). So are any two of them, and as the sum of all T_j^2 does not vary, Cov(T_i^2, T_j^2) =
-Var(T_1^2)/(n-2): the last factor, as if drawn without replacement. At k = n - 1 nothing is left to chance.

Independent signs, unbiased for Q = sum_b c_b^2 by themselves, have Var = 2 (Q^2 - sum_b c_b^4)/k: they see the mean
gradient as noise, and no number of them is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrasts(examples: int, most: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """w (k, B) of k = min(most, n - 1) contrasts, and the factor (n-1)/(n k) of the sum of their squares.

    One example has none, k = 0, and D = 0.
    """
    levels = (examples - 1).bit_length()
    n = 2**levels
    k = min(most, n - 1)
    device = generator.device
    columns = torch.randperm(n, generator=generator, device=device)[:examples]
    bits = torch.arange(levels, device=device)
    # Sylvester's matrix: the sign of entry (j, b) is the parity of the bits that j and b share.
    of_rows = (torch.arange(1, k + 1, device=device).unsqueeze(1) >> bits & 1).double()  # (k, levels)
    of_columns = (columns.unsqueeze(1) >> bits & 1).double()  # (B, levels)
    signs = 1 - 2 * (of_rows @ of_columns.T % 2)
    return signs - signs.mean(1, keepdim=True), (n - 1) / (n * k) if k else 0.0
