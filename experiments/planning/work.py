"""What a sum over examples costs beside the gradient, by the form of the contributions.

n examples, t positions, a weight of o x i. Matmuls are 2 FLOPs for a product and a sum, as torch counts them:

    Outer               2 n o i     sum_b c_b^2 = (d^2)^T a^2 is a second matmul; norms are products of norms
    OuterSum            0           the gradient is summed from what is formed for the squares
    ConvolutionWeight   0           the same
    Rows, Dense         0           no matmul at all
    a head whose weight is the embedding's, looked up at s positions:
                        2 n s t i   its contributions there

Squares: 2 for each entry of a contribution that is formed, n o i, and added up; n t o of Rows; n (o + i) of the factors
of Outer. In time they count where positions are few.

Bytes beside operands and results are those of the kernels in C++ and in Triton, which keep contributions in registers,
where there are any, and of the first way otherwise: of Outer on a GPU, the squares of its factors.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import NamedTuple

from experiments.errors import UserError
from gradstats.contribution import BLOCK, CACHED, Contribution
from gradstats.forms.convolution_weight import ConvolutionWeight
from gradstats.forms.dense import Dense
from gradstats.forms.outer import Outer, OuterSum
from gradstats.forms.rows import Rows
from gradstats.joint import positions
from gradstats.sums import OF_SQUARES, accumulation_dtype

IDS = 5 * 8  # bytes for each id: sorted, their order, which are the first, and where these are


class Work(NamedTuple):
    """gradient: FLOPs of the gradient itself, which plain torch computes too, at so many `positions` an example;
    matmuls and squares: FLOPs beside it; temporary: bytes while the sums are made."""

    form: str
    positions: int = 1
    gradient: int = 0
    matmuls: int = 0
    squares: int = 0
    temporary: int = 0


def work(form: Contribution, sums: Collection[str], on_gpu: bool = False) -> Work:
    """Of these sums of one parameter. Raises: UserError for sums and forms that have no formula here."""
    if unknown := set(sums) - OF_SQUARES:
        raise UserError(f"no formula says what {', '.join(sorted(unknown))} costs: choose an optimizer of squares")
    n, size, squared = form.count, prod(form.shape), "sum_of_squares" in sums
    itemsize = accumulation_dtype(form.dtype).itemsize
    formed, name = 2 * len(sums) * n * size, type(form).__name__
    match form:
        case Outer():
            factors = n * sum(form.shape)
            norms = 2 * factors * ("squared_norms" in sums)
            squares = factors * squared
            temporary = itemsize * squares if on_gpu else 0
            return Work(name, 1, 2 * n * size, 2 * n * size * squared, squares + norms, temporary)
        case OuterSum():
            rounded = form.dtype.itemsize < itemsize  # the gradient is summed in float32 first
            t = form.d.shape[1]
            return Work(name, t, 2 * n * t * size, 0, formed, itemsize * size * rounded)
        case ConvolutionWeight():
            t = prod(form._operands[0].shape[2:])
            numbers = of_convolution(form, sums) if sums else 0
            return Work(name, t, 2 * n * t * size, 0, formed, itemsize * numbers)
        case Rows():
            entries = form.d.numel()
            return Work(name, 1, 0, 0, 2 * len(sums) * entries, 2 * itemsize * entries + IDS * form.ids.numel())
        case Dense():
            return Work(name, 1, 0, 0, formed, itemsize * n * size)
    raise UserError(f"no formula says what statistics of {name} cost ('{form.parameter}')")


def of_convolution(form: ConvolutionWeight, sums: Collection[str]) -> int:
    """Numbers in memory."""
    size = prod(form.shape)
    match next(iter(form.ways(sums))):
        case "unfolded":
            rows, source = form._operands
            windows = form.count * prod(form.shape[1:]) * prod(rows.shape[2:])
            return min(windows, max(BLOCK, 2 * size)) + 2 * size + source.numel()
        case "grouped":
            return 2 * min(form.count * size, CACHED) + 2 * size
        case _:
            return size


def looked_up(head: Contribution, ids: int) -> tuple[Work, int]:
    """What it takes more that `head` is looked up at so many ids an example, and bytes that wait for the lookups.

    Raises: UserError for a head that is no Linear."""
    if not isinstance(head, Outer | OuterSum):
        raise UserError(f"no formula says what an embedding costs that is shared with {type(head).__name__}")
    d, a = positions(head)
    (n, t, _), i = d.shape, a.shape[2]
    itemsize = accumulation_dtype(head.dtype).itemsize
    return Work("Looked", 1, 0, 2 * n * ids * t * i, 0, itemsize * n * t * ids), itemsize * n * ids * i
