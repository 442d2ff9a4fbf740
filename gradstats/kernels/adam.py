"""A step of BatchInvariantAdam over all parameters in one launch, whatever their number and sizes.

    v = product m^2 + square q        m~ <- m~ + w1 (m - m~)        s <- s + w2 (v - s)
    p <- decay p - step m~ / (sqrt(s) + eps)

with m the mean gradient and q the second moment. A compiled kernel (optim/elementwise.py) takes a launch for every few
parameters, so that the host and not the device would set the pace of hundreds of small ones. This is the equation of
AdamUpdate (optim/adam.py) with its default choices; any other is left to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.optim.adam import AdamUpdate
from gradstats.optim.elementwise import Columns, Row, as_tensor
from gradstats.optim.moment import Moment
from gradstats.optim.update import Phase, Update

# Elements of a program.
BLOCK = 1024

# Bytes to which addresses must be aligned for a program to read several elements at once.
ALIGNED = 16

# In the orders in which the kernel reads them.
SCALARS = ("mean_scale", "second_moment_scale", "product", "square", "w1", "w2", "step", "eps", "decay")
COLUMNS = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "sum_of_squares")
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _column(addresses, column: tl.constexpr, TYPE: tl.constexpr, TENSORS, tensor, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + column * TENSORS + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if IS_ALIGNED else pointer


@triton.jit
def _moved(parameters, gradients, averages, moments, sums, mask, scalars, READS: tl.constexpr):
    m = tl.load(gradients, mask=mask).to(tl.float32) * tl.load(scalars).to(tl.float32)
    v = tl.load(scalars + 2).to(tl.float32) * m * m
    if READS:
        q = tl.load(sums, mask=mask) * tl.load(scalars + 1).to(tl.float32)
        v += tl.load(scalars + 3).to(tl.float32) * q
    average = tl.load(averages, mask=mask)
    average += tl.load(scalars + 4).to(tl.float32) * (m - average)
    s = tl.load(moments, mask=mask)
    s += tl.load(scalars + 5).to(tl.float32) * (v - s)
    change = tl.load(scalars + 6).to(tl.float32) * average / (tl.sqrt(s) + tl.load(scalars + 7).to(tl.float32))
    p = tl.load(parameters, mask=mask).to(tl.float32)
    tl.store(averages, average, mask=mask)
    tl.store(moments, s, mask=mask)
    tl.store(parameters, p * tl.load(scalars + 8).to(tl.float32) - change, mask=mask)


@triton.jit
def _step(
    addresses,  # (4 or 5, TENSORS), of COLUMNS
    sizes,  # (TENSORS,)
    owners,  # (programs,) whose elements a program moves
    blocks,  # (programs,) which BLOCK of them
    scalars,  # (9,) float64
    TENSORS,
    TYPE: tl.constexpr,
    READS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    size = tl.load(sizes + tensor)
    place = tl.load(blocks + program) * BLOCK + tl.arange(0, BLOCK)
    parameters = _column(addresses, 0, TYPE, TENSORS, tensor, IS_ALIGNED) + place
    gradients = _column(addresses, 1, TYPE, TENSORS, tensor, IS_ALIGNED) + place
    averages = _column(addresses, 2, tl.float32, TENSORS, tensor, IS_ALIGNED) + place
    moments = _column(addresses, 3, tl.float32, TENSORS, tensor, IS_ALIGNED) + place
    sums = moments
    if READS:
        sums = _column(addresses, 4, tl.float32, TENSORS, tensor, IS_ALIGNED) + place
    # Several elements are read at once where no mask may divide them.
    if (tl.load(blocks + program) + 1) * BLOCK <= size:
        _moved(parameters, gradients, averages, moments, sums, None, scalars, READS)
    else:
        _moved(parameters, gradients, averages, moments, sums, place < size, scalars, READS)


def serves(update: Update, phase: Phase, columns: Columns) -> bool:
    """Whether the equation above is that of an update, and the kernel takes what the columns hold."""
    if not isinstance(update, AdamUpdate) or phase != "both":
        return False
    dtypes = dict.fromkeys(columns, torch.float32) | dict.fromkeys(COLUMNS[:2], columns["parameter"][0].dtype)
    if any(t.dtype != dtypes[name] for name, column in columns.items() for t in column):
        return False
    return update == AdamUpdate(Moment(update.moment.reads), statistics=update.statistics)


def step(names: Sequence[str], rows: Sequence[Row], scalars: Mapping[str, Any]) -> None:
    """Moves parameters of one device and dtype: `rows` of flat tensors, one a parameter, in the order of `names`."""
    device, dtype = rows[0][0].device, rows[0][0].dtype
    order = [names.index(name) for name in COLUMNS if name in names]
    addresses = [row[i].data_ptr() for i in order for row in rows]
    sizes, owners, blocks = programs(tuple(row[0].numel() for row in rows), device)
    with torch.cuda.device_of(rows[0][0]):
        _step[(len(owners),)](
            torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True),
            sizes,
            owners,
            blocks,
            as_tensor({name: scalars.get(name, 0.0) for name in SCALARS}, device),
            len(rows),
            TYPE=TYPES[dtype],
            READS="sum_of_squares" in names,
            IS_ALIGNED=all(address % ALIGNED == 0 for address in addresses),
            BLOCK=BLOCK,
        )


@functools.lru_cache(maxsize=16)
def programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes of tensors; and for every program, the tensor whose elements it moves, and which block of them."""
    counts = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    owners = torch.repeat_interleave(counts)
    blocks = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    return torch.tensor(sizes).to(device), owners.int().to(device), blocks.to(device)
