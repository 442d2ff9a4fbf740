"""Embedding rows: gradient, sum of squares and squared norms from ids (n, t) and d (n, t, o).

    c_n[r] = sum of d_nt over the positions t with ids_nt = r

Positions are sorted by row, then by example. One kernel sums each run of equal (row, example), which is a c_n[r]; a
second one sums these, and their squares, over each run of equal rows. Runs are found without a count of them, which the
host would wait for: there is a program for every position, and those that do not begin a run have nothing to do. No
atomics: the same sums in the same order, always.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.sums import Reduction, present

# Positions and features that a program reads at once.
POSITIONS = 32
FEATURES = 128


@triton.jit
def _pairs(
    d,  # (positions, F)
    order,
    begin,
    end,
    c,  # (positions, F), at the first position of every run
    norms,  # (positions, blocks of features), at its place in the batch; or None
    F,
    d_p,
    d_f,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    if tl.load(begin + place) == place:
        f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
        last = tl.load(end + place)
        total = tl.zeros((BLOCK_F,), tl.float32)
        for start in range(place, last, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            source = tl.load(order + p, mask=p < last, other=0)
            mask = (p < last)[:, None] & (f < F)[None, :]
            values = tl.load(d + source[:, None] * d_p + f[None, :] * d_f, mask=mask, other=0.0)
            total += tl.sum(values.to(tl.float32), 0)
        tl.store(c + place * F + f, total, mask=f < F)
        if norms is not None:
            tl.store(norms + tl.load(order + place) * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total))


@triton.jit
def _rows(
    ids,  # (positions,), sorted
    c,
    first,  # (positions,) where the run of equal (row, example) begins
    begin,  # (positions,) where the run of equal rows does
    end,
    gradient,  # (rows, F)
    squares,  # the same, or None
    F,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    if tl.load(begin + place) == place:
        f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
        last = tl.load(end + place)
        g = tl.zeros((BLOCK_F,), tl.float32)
        s = tl.zeros((BLOCK_F,), tl.float32)
        for start in range(place, last, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P).to(tl.int64)
            mine = tl.load(first + p, mask=p < last, other=-1) == p
            values = tl.load(c + p[:, None] * F + f[None, :], mask=mine[:, None] & (f < F)[None, :], other=0.0)
            g += tl.sum(values, 0)
            if squares is not None:
                s += tl.sum(values * values, 0)
        target = tl.load(ids + place) * F + f
        tl.store(gradient + target, g, mask=f < F)
        if squares is not None:
            tl.store(squares + target, s, mask=f < F)


def sums(ids: Tensor, d: Tensor, rows: int, names: Collection[str]) -> Reduction:
    """The gradient (rows, o) in d's dtype, and those of sum_of_squares (rows, o) and squared_norms (n,), in float32,
    that are named."""
    n, t, o = d.shape
    example = torch.arange(n, device=ids.device).unsqueeze(1)
    keys, order = (ids.long() * n + example).flatten().sort(stable=True)
    first, last = runs(keys)
    sorted_ids = keys // n
    begin, end = runs(sorted_ids)
    width = min(FEATURES, triton.next_power_of_2(o))
    blocks = {"BLOCK_P": POSITIONS, "BLOCK_F": width}
    grid = (n * t, triton.cdiv(o, width))
    c = d.new_empty((n * t, o), dtype=torch.float32)
    gradient = d.new_zeros((rows, o))
    squares = d.new_zeros((rows, o), dtype=torch.float32) if "sum_of_squares" in names else None
    norms = d.new_zeros((n * t, grid[1]), dtype=torch.float32) if "squared_norms" in names else None
    flat = d.flatten(0, 1)
    with torch.cuda.device_of(d):
        _pairs[grid](flat, order, first, last, c, norms, o, *flat.stride(), **blocks)
        _rows[grid](sorted_ids, c, first, begin, end, gradient, squares, o, **blocks)
    norms = norms if norms is None else norms.reshape(n, -1).sum(1)
    return gradient, present({"sum_of_squares": squares, "squared_norms": norms})


def runs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal entries that each of sorted `values` is in begins, and where it ends."""
    return torch.searchsorted(values, values), torch.searchsorted(values, values, right=True)
