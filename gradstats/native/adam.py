"""A step of BatchInvariantAdam on the CPU, over all parameters in one call: the equation of AdamUpdate in C++.

What decides the time of a small model's step is the number of calls, and of a large one's that each tensor is read and
written once; plain torch has too many of the former, and a kernel that is compiled for any equation a call for every
few parameters.
"""

from __future__ import annotations

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
from gradstats.sums import PLAIN

DTYPES = torch.float32, torch.float64, torch.bfloat16
# In the orders of adam.cpp.
COLUMNS = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "sum_of_squares", "exp_avg_q", "previous")
SCALARS = (
    *("mean_scale", "second_moment_scale", "product", "square", "w1", "w2", "w3", "step", "eps", "decay"),
    *("first", "unbias", "inverse_reference", "clip"),
)
PHASES: dict[Phase, int] = {"both": 0, "averages": 1, "move": 2}
# By m's partner, and whether m is kept for the next batch, as it is for good once a batch was smaller than R.
PARTNERS = {(None, False): 0, ("exp_avg", False): 1, ("previous", True): 2, (None, True): 3}
# Elements that are worth another thread, which takes some microseconds to wake.
GRAIN = 1 << 15

address = attrgetter("_cdata")  # of a tensor, not of its numbers


def knows(update: Update) -> bool:
    """Whether the equation of adam.cpp is that of an update."""
    if not isinstance(update, AdamUpdate):
        return False
    moment = update.moment
    if moment.floored and (moment.misses or moment.waits):  # two bounds, or an average of squares that are not there
        return False
    kept = Moment(
        moment.reads,
        partner=moment.partner,
        floored=moment.floored and moment.reads,
        infinite=moment.infinite,
        remembers=moment.remembers,
        waits=moment.waits,
        misses=moment.misses,
    )
    known = (moment.partner, moment.remembers) in PARTNERS
    return known and update == AdamUpdate(kept, statistics=update.statistics)


def serves(update: Update, parameter: Tensor) -> bool:
    """Whether there is a kernel for an update of parameters like this one: its equation is known, it is on the CPU, and
    there is a compiler."""
    on_cpu = parameter.device.type == "cpu" and parameter.dtype in DTYPES
    return native.enabled and on_cpu and knows(update) and native.library("adam") is not None


def step(update: Update, phase: Phase, columns: Mapping[str, Sequence[Tensor]], scalars: Mapping[str, Any]) -> bool:
    """One phase of an update of all parameters of the columns; False, and nothing is moved, if one of the tensors is
    not as it is wanted: of the dtypes and size of its parameter, and dense in the order in which indices count."""
    assert isinstance(update, AdamUpdate)
    count, moment, kernels = len(columns["parameter"]), update.moment, native.library("adam")
    assert kernels is not None
    addresses = array("Q")
    for name in COLUMNS:
        column = columns.get(name)
        if column is None:
            addresses.extend([0] * count)
        elif PLAIN.issuperset(map(type, column)):
            addresses.extend(map(address, column))
        else:
            return False
    if moment.waits:
        scalars = {**scalars, "product": 0.0, "w2": 0.0}  # v = 0, which s does not move to
    numbers = array("d", [scalars.get(name, 1.0) for name in SCALARS])
    bound = 1 if moment.floored else 2 if moment.infinite or moment.misses else 0
    options = PHASES[phase], PARTNERS[moment.partner, moment.remembers], bound, "sum_of_squares" in columns
    tables = count, addresses.buffer_info()[0], numbers.buffer_info()[0]
    return bool(kernels.adam(*options, *tables, torch.get_num_threads(), GRAIN))
