"""Linear with positions: gradient, sum of squares and squared norms in one pass over d (n, t, o) and a (n, t, i).

    c_n = sum_t d_nt a_nt^T        gradient = sum_n c_n        sum_of_squares = sum_n c_n^2        ||c_n||^2

A program owns a tile of the weight. It forms the tile of one example after the other by matrix multiplications over the
positions, and adds it to a tile of the gradient and, squared, to one of the sum of squares: three tiles in registers,
and nothing is written but the results. The arithmetic is that of the batch gradient, but for two additions an element
and example. No atomics: a program writes what no other does, and what is split is added up in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats import kernels
from gradstats.sums import Reduction, present


class Tile(NamedTuple):
    """Of the weight (o, i), by blocks of t positions of two bytes, and the warps that share it."""

    o: int
    i: int
    t: int
    warps: int


# Every operand is read once for each tile across: large tiles read less and small ones fill a device with less weight.
LARGE, TALL, WIDE, SMALL = Tile(128, 128, 64, 8), Tile(128, 64, 64, 8), Tile(64, 128, 64, 8), Tile(64, 64, 64, 4)

# Positions from which operands, not the tile's additions, are most of the traffic.
LONG = 64

# Bytes that partial sums of a weight split over examples may take.
WORKSPACE = 1 << 26


@triton.jit
def _sums(
    d,
    a,
    gradient,  # (splits, O, I)
    squares,  # the same, or None
    norms,  # (N, tiles) or None
    N,
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    d_n,
    d_t,
    a_n,
    a_t,
    share,  # examples of a program
    PRECISION: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Offsets from the first element of a tile in 32 bits, that one's in 64: a batch of logits has more than 2^31.
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(I, TILE_I)
    o = tile // across * TILE_O + tl.arange(0, TILE_O)
    i = tile % across * TILE_I + tl.arange(0, TILE_I)
    t = tl.arange(0, BLOCK_T)
    inside = (o < O)[:, None] & (i < I)[None, :]
    first = split * share
    d += first * d_n + (tile // across).to(tl.int64) * TILE_O
    a += first * a_n + (tile % across).to(tl.int64) * TILE_I
    d_place = tl.arange(0, TILE_O)[:, None] + t[None, :] * d_t
    a_place = t[:, None] * a_t + tl.arange(0, TILE_I)[None, :]
    if norms is not None:
        norms += first * tl.num_programs(0) + tile
    g = tl.zeros((TILE_O, TILE_I), tl.float32)
    s = tl.zeros((TILE_O, TILE_I), tl.float32)
    for _ in range(first, tl.minimum(first + share, N)):
        c = tl.zeros((TILE_O, TILE_I), tl.float32)
        left_of, right_of = d, a
        for start in range(0, T, BLOCK_T):
            left = tl.load(left_of + d_place, mask=(o < O)[:, None] & (t < T - start)[None, :], other=0.0)
            right = tl.load(right_of + a_place, mask=(t < T - start)[:, None] & (i < I)[None, :], other=0.0)
            c = tl.dot(left, right, c, input_precision=PRECISION)
            left_of += d_t * BLOCK_T
            right_of += a_t * BLOCK_T
        g += c
        if squares is not None:
            s += c * c
        if norms is not None:
            # Masked: where one operand is infinite, zeros of the other make NaN beyond the weight's edge.
            tl.store(norms, tl.sum(tl.where(inside, c * c, 0.0)))
            norms += tl.num_programs(0)
        d += d_n
        a += a_n
    place = (split * O + o[:, None]) * I + i[None, :]
    tl.store(gradient + place, g, mask=inside)
    if squares is not None:
        tl.store(squares + place, s, mask=inside)


def ways(d: Tensor, a: Tensor, names: Collection[str]) -> dict[str, Callable[[], Reduction]]:
    """Ways, for gradstats.choice, to the gradient (o, i) in d's dtype and those of sum_of_squares (o, i) and
    squared_norms (n,), in float32, that are named: one for each tile, the likeliest one first."""
    tiles = {fitted(tile, d, a): None for tile in ordered(d.shape[1])}
    return {f"triton {tile.o} x {tile.i}": functools.partial(sums, d, a, names, tile) for tile in tiles}


def ordered(positions: int) -> tuple[Tile, ...]:
    """All tiles, the likeliest one first."""
    return (LARGE, TALL, WIDE, SMALL) if positions >= LONG else (SMALL, TALL, WIDE, LARGE)


def fitted(tile: Tile, d: Tensor, a: Tensor) -> Tile:
    """A tile no larger than it must be, and as many bytes of positions whatever the dtype."""
    (_, t, o), i = d.shape, a.shape[2]
    positions = tile.t * 2 // d.element_size()
    return Tile(min(tile.o, covering(o)), min(tile.i, covering(i)), min(positions, covering(t)), tile.warps)


def covering(n: int) -> int:
    """The smallest size of a block that holds n: a power of two, and what matrix units multiply at least."""
    return max(16, triton.next_power_of_2(n))


@functools.cache
def splits(examples: int, tiles: int, elements: int, tile: Tile, device: torch.device) -> int:
    """Into how many parts the examples of a weight of so many tiles and elements are split.

    As few as give the shortest time, rounds of programs that the device holds at once times examples of each; what
    limits these is taken to be registers, three tiles and 64 a thread.
    """
    threads = 32 * tile.warps
    held = kernels.multiprocessors(device) * max(1, (1 << 16) // (3 * tile.o * tile.i + 64 * threads))
    most = max(1, min(examples, WORKSPACE // (8 * elements)))  # gradient and squares in float32
    return min(range(1, most + 1), key=lambda k: (triton.cdiv(tiles * k, held) * triton.cdiv(examples, k), k))


def sums(d: Tensor, a: Tensor, names: Collection[str], tile: Tile) -> Reduction:
    """What `ways` says, by a tile of the given size."""
    (n, t, o), i = d.shape, a.shape[2]
    d, a = readable(d, tile.t), readable(a, tile.t)
    tiles = triton.cdiv(o, tile.o) * triton.cdiv(i, tile.i)
    k = splits(n, tiles, o * i, tile, d.device)
    gradient = d.new_empty((k, o, i), dtype=d.dtype if k == 1 else torch.float32)
    squares = d.new_empty((k, o, i), dtype=torch.float32) if "sum_of_squares" in names else None
    norms = d.new_empty((n, tiles), dtype=torch.float32) if "squared_norms" in names else None
    with torch.cuda.device_of(d):
        _sums[(tiles, k)](
            d,
            a,
            gradient,
            squares,
            norms,
            n,
            t,
            o,
            i,
            *d.stride()[:2],
            *a.stride()[:2],
            triton.cdiv(n, k),
            PRECISION=precision(),
            TILE_O=tile.o,
            TILE_I=tile.i,
            BLOCK_T=tile.t,
            num_warps=tile.warps,
        )
    found = {
        "sum_of_squares": squares if squares is None else total(squares),
        "squared_norms": norms if norms is None else norms.sum(1),
    }
    return total(gradient).to(d.dtype), present(found)


def readable(x: Tensor, positions: int) -> Tensor:
    """x (n, t, features), or a copy where features are not next to each other, or positions of a tile 2^31 apart."""
    return x if x.stride(2) == 1 and positions * x.stride(1) < 2**31 - 2**16 else x.contiguous()


def total(parts: Tensor) -> Tensor:
    """The sum over dimension 0, a view where there is but one entry."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def precision() -> str:
    """How float32 is multiplied: as torch's own matmuls on the device are at this moment."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
