"""A step of BatchInvariantAdam on the CPU, over all parameters in one call: the equation of AdamUpdate in C++.

What decides the time of a small model's step is the number of calls, and of a large one's that each tensor is read and
written once; plain torch has too many of the former, and a kernel that is compiled for any equation a call for every
few parameters.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gradstats import native
from gradstats.optim.adam import AdamUpdate
from gradstats.optim.moment import Moment
from gradstats.optim.update import Phase, Update
from gradstats.sums import accumulation_dtype, addressable

KERNELS = {torch.float32: "adam_float32", torch.float64: "adam_float64", torch.bfloat16: "adam_bfloat16"}
# In the orders of adam.cpp.
COLUMNS = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "sum_of_squares", "exp_avg_q", "previous")
SCALARS = (
    *("mean_scale", "second_moment_scale", "product", "square", "w1", "w2", "w3", "step", "eps", "decay"),
    *("first", "unbias", "inverse_reference", "clip"),
)
PHASES: dict[Phase, int] = {"both": 0, "averages": 1, "move": 2}
PARTNERS = {None: 0, "exp_avg": 1, "previous": 2}
# Elements that are worth another thread, which takes some microseconds to wake.
GRAIN = 1 << 15

dtype_of = attrgetter("dtype")


def knows(update: Update) -> bool:
    """Whether the equation of adam.cpp is that of an update."""
    if not isinstance(update, AdamUpdate):
        return False
    moment = update.moment
    kept = Moment(
        moment.reads,
        partner=moment.partner,
        floored=moment.floored and moment.reads,
        infinite=moment.infinite,
        remembers=moment.partner == "previous",
    )
    return update == AdamUpdate(kept, statistics=update.statistics)


def serves(update: Update, parameter: Tensor) -> bool:
    """Whether there is a kernel for an update of parameters like this one: its equation is known, it is on the CPU, and
    there is a compiler."""
    on_cpu = parameter.device.type == "cpu" and parameter.dtype in KERNELS
    return native.enabled and on_cpu and knows(update) and native.library() is not None


def step(update: Update, phase: Phase, columns: Mapping[str, Sequence[Tensor]], scalars: Mapping[str, Any]) -> bool:
    """One phase of an update of all parameters of the columns; False, and nothing is moved, if one of the tensors is
    not as it is wanted: of the dtypes and size of its parameter, and dense in the order in which indices count."""
    assert isinstance(update, AdamUpdate)
    parameters, moment = columns["parameter"], update.moment
    dtype, sizes = parameters[0].dtype, array("q", map(Tensor.numel, parameters))
    addresses, nothing = array("Q"), [0] * len(sizes)
    for name in COLUMNS:
        column, wanted = columns.get(name), dtype if name in COLUMNS[:2] else accumulation_dtype(dtype)
        if column is None:
            addresses.extend(nothing)
            continue
        # The kernel is told of sizes once, and believes them.
        alike = set(map(dtype_of, column)) == {wanted} and array("q", map(Tensor.numel, column)) == sizes
        if not (alike and addressable(*column) and all(map(Tensor.is_contiguous, column))):
            return False
        addresses.extend(map(Tensor.data_ptr, column))
    numbers = array("d", [scalars.get(name, 1.0) for name in SCALARS])
    getattr(native.library(), KERNELS[dtype])(
        ctypes.c_int(PHASES[phase]),
        ctypes.c_int(PARTNERS[moment.partner]),
        ctypes.c_int(1 if moment.floored else 2 if moment.infinite else 0),
        ctypes.c_int("sum_of_squares" in columns),
        ctypes.c_int64(len(sizes)),
        *(ctypes.c_void_p(table.buffer_info()[0]) for table in (sizes, addresses, numbers)),
        ctypes.c_int(max(1, min(torch.get_num_threads(), sum(sizes) // GRAIN))),
    )
    return True
